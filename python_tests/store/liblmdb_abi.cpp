// Compiles if csrc/host/liblmdb.h says what this machine's lmdb.h says.
#include <lmdb.h>

#include <type_traits>

#include "liblmdb.h"

namespace ours = vista::host::liblmdb;

#define SAME_FIELD(type, field)                                         \
  static_assert(offsetof(ours::type, field) == offsetof(type, field) && \
                sizeof(ours::type::field) == sizeof(type::field))
#define SAME_SIZE(type) static_assert(sizeof(ours::type) == sizeof(type))

SAME_SIZE(MDB_val);
SAME_FIELD(MDB_val, mv_size);
SAME_FIELD(MDB_val, mv_data);
SAME_SIZE(MDB_dbi);
SAME_SIZE(MDB_stat);
SAME_FIELD(MDB_stat, ms_psize);
SAME_FIELD(MDB_stat, ms_entries);
SAME_SIZE(MDB_envinfo);
SAME_FIELD(MDB_envinfo, me_mapsize);
SAME_FIELD(MDB_envinfo, me_last_pgno);

static_assert(ours::kReadOnly == MDB_RDONLY && ours::kCreate == MDB_CREATE && ours::kNoThreadLocal == MDB_NOTLS &&
              ours::kNoReadAhead == MDB_NORDAHEAD);
static_assert(ours::kNotFound == MDB_NOTFOUND && ours::kMapFull == MDB_MAP_FULL &&
              ours::kMapResized == MDB_MAP_RESIZED);
static_assert(int(ours::kFirst) == MDB_FIRST && int(ours::kLast) == MDB_LAST && int(ours::kNext) == MDB_NEXT &&
              int(ours::kPrevious) == MDB_PREV && int(ours::kSetRange) == MDB_SET_RANGE);

// Functions agree if ours, with our types put back, are theirs: as many arguments, of the same sizes, in the same
// order.
template <typename T>
constexpr size_t size_of_result = sizeof(T);
template <>
constexpr size_t size_of_result<void> = 0;

template <typename Ours, typename Theirs>
struct Same : std::false_type {};
template <typename R, typename S, typename... A, typename... B>
struct Same<R (*)(A...), S (*)(B...)> {
  static constexpr bool counts() { return sizeof...(A) == sizeof...(B); }
  static constexpr bool sizes() {
    if constexpr (sizeof...(A) == sizeof...(B)) return ((sizeof(A) == sizeof(B)) && ...);
    return false;
  }
  static constexpr bool pointers() {
    if constexpr (sizeof...(A) == sizeof...(B)) return ((std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
    return false;
  }
  static constexpr bool value = counts() && sizes() && pointers() && size_of_result<R> == size_of_result<S>;
};

#define SAME_FUNCTION(name, result, arguments) \
  static_assert(Same<decltype(ours::Functions::name), decltype(&mdb_##name)>::value, #name);
VISTA_LIBLMDB_FUNCTIONS(SAME_FUNCTION)
