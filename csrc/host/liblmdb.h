// The part of liblmdb's binary interface (0.9) that we call, found when it is needed: no header and no library at build
// time, and a package that installs where there is none. python_tests/store/liblmdb_abi.cpp compares with lmdb.h.
#pragma once

#include <cstddef>

namespace vista::host::liblmdb {

struct MDB_env;
struct MDB_txn;
struct MDB_cursor;
using MDB_dbi = unsigned int;

struct MDB_val {
  size_t mv_size;
  void* mv_data;
};

struct MDB_stat {
  unsigned int ms_psize, ms_depth;
  size_t ms_branch_pages, ms_leaf_pages, ms_overflow_pages, ms_entries;
};

struct MDB_envinfo {
  void* me_mapaddr;
  size_t me_mapsize, me_last_pgno, me_last_txnid;
  unsigned int me_maxreaders, me_numreaders;
};

constexpr unsigned int kReadOnly = 0x20000, kCreate = 0x40000, kNoThreadLocal = 0x200000, kNoReadAhead = 0x800000;
constexpr int kNotFound = -30798, kMapFull = -30792, kMapResized = -30785;
enum CursorOp { kFirst = 0, kLast = 6, kNext = 8, kPrevious = 12, kSetRange = 17 };

// Name without the prefix, result, arguments.
#define VISTA_LIBLMDB_FUNCTIONS(FUNCTION)                                      \
  FUNCTION(version, char*, (int*, int*, int*))                                 \
  FUNCTION(strerror, char*, (int))                                             \
  FUNCTION(env_create, int, (MDB_env**))                                       \
  FUNCTION(env_open, int, (MDB_env*, const char*, unsigned int, unsigned int)) \
  FUNCTION(env_close, void, (MDB_env*))                                        \
  FUNCTION(env_copy, int, (MDB_env*, const char*))                             \
  FUNCTION(env_stat, int, (MDB_env*, MDB_stat*))                               \
  FUNCTION(env_info, int, (MDB_env*, MDB_envinfo*))                            \
  FUNCTION(env_set_mapsize, int, (MDB_env*, size_t))                           \
  FUNCTION(env_set_maxdbs, int, (MDB_env*, MDB_dbi))                           \
  FUNCTION(env_set_maxreaders, int, (MDB_env*, unsigned int))                  \
  FUNCTION(reader_check, int, (MDB_env*, int*))                                \
  FUNCTION(txn_begin, int, (MDB_env*, MDB_txn*, unsigned int, MDB_txn**))      \
  FUNCTION(txn_commit, int, (MDB_txn*))                                        \
  FUNCTION(txn_abort, void, (MDB_txn*))                                        \
  FUNCTION(dbi_open, int, (MDB_txn*, const char*, unsigned int, MDB_dbi*))     \
  FUNCTION(stat, int, (MDB_txn*, MDB_dbi, MDB_stat*))                          \
  FUNCTION(get, int, (MDB_txn*, MDB_dbi, MDB_val*, MDB_val*))                  \
  FUNCTION(put, int, (MDB_txn*, MDB_dbi, MDB_val*, MDB_val*, unsigned int))    \
  FUNCTION(del, int, (MDB_txn*, MDB_dbi, MDB_val*, MDB_val*))                  \
  FUNCTION(cursor_open, int, (MDB_txn*, MDB_dbi, MDB_cursor**))                \
  FUNCTION(cursor_close, void, (MDB_cursor*))                                  \
  FUNCTION(cursor_get, int, (MDB_cursor*, MDB_val*, MDB_val*, CursorOp))       \
  FUNCTION(cursor_del, int, (MDB_cursor*, unsigned int))

#define VISTA_LIBLMDB_POINTER(name, result, arguments) result(*name) arguments = nullptr;
struct Functions {
  VISTA_LIBLMDB_FUNCTIONS(VISTA_LIBLMDB_POINTER)
};
#undef VISTA_LIBLMDB_POINTER

}  // namespace vista::host::liblmdb
