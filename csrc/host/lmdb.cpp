// liblmdb for Python: py-lmdb's names and meanings where it has them (vista_ext/store/environment.py takes either), and
// `read_records`, which py-lmdb cannot offer: it finds all values before it touches one of them.
#include <dlfcn.h>
#include <pybind11/numpy.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "liblmdb.h"
#include "records.h"

namespace py = pybind11;

namespace vista::host {
namespace {

using namespace liblmdb;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct NotFoundError : Error {
  using Error::Error;
};
struct MapFullError : Error {
  using Error::Error;
};
struct MapResizedError : Error {
  using Error::Error;
};

Functions library;

void check(int code, const char* call) {
  if (code == 0) return;
  const std::string message = std::string("mdb_") + call + ": " + library.strerror(code);
  if (code == kNotFound) throw NotFoundError(message);
  if (code == kMapFull) throw MapFullError(message);
  if (code == kMapResized) throw MapResizedError(message);
  throw Error(message);
}

std::string load(const std::string& path, const std::string& prefix) {
  if (library.version != nullptr) throw Error("liblmdb is loaded already");
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw Error(dlerror());
  Functions found;
#define VISTA_LIBLMDB_FIND(name, result, arguments)                                            \
  found.name = reinterpret_cast<result(*) arguments>(dlsym(handle, (prefix + #name).c_str())); \
  if (found.name == nullptr) throw Error(path + " has no " + prefix + #name);
  VISTA_LIBLMDB_FUNCTIONS(VISTA_LIBLMDB_FIND)
#undef VISTA_LIBLMDB_FIND
  int major = 0, minor = 0, patch = 0;
  found.version(&major, &minor, &patch);
  const std::string version = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  // What liblmdb.h states is the interface of 0.9, and other versions write other files.
  if (major != 0 || minor != 9) throw Error(path + " is liblmdb " + version + ", expected 0.9");
  library = found;
  return version;
}

MDB_val value_of(std::string_view bytes) { return {bytes.size(), const_cast<char*>(bytes.data())}; }

py::memoryview view_of(const MDB_val& value) { return py::memoryview::from_memory(value.mv_data, value.mv_size, true); }

struct Database {
  MDB_dbi handle;
};

class Transaction;

class Environment {
 public:
  Environment(const std::string& path, size_t map_size, unsigned int max_dbs, unsigned int max_readers, bool readonly) {
    if (library.version == nullptr) throw Error("liblmdb is not loaded");
    check(library.env_create(&env_), "env_create");
    try {
      check(library.env_set_mapsize(env_, map_size), "env_set_mapsize");
      check(library.env_set_maxdbs(env_, max_dbs), "env_set_maxdbs");
      check(library.env_set_maxreaders(env_, max_readers), "env_set_maxreaders");
      // Records lie scattered: reading ahead of a page fault would read others'. Many records are asked for at once.
      const unsigned int flags = kNoThreadLocal | kNoReadAhead | (readonly ? kReadOnly : 0);
      check(library.env_open(env_, path.c_str(), flags, 0644), path.c_str());
    } catch (...) {
      close();
      throw;
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() { close(); }

  void close() {
    if (env_ != nullptr) library.env_close(std::exchange(env_, nullptr));
  }

  MDB_env* get() const {
    if (env_ == nullptr) throw Error("the environment is closed");
    return env_;
  }

  Database open_db(const std::string& name, bool create) {
    MDB_txn* txn = nullptr;
    Database db{};
    check(library.txn_begin(get(), nullptr, create ? 0 : kReadOnly, &txn), "txn_begin");
    const int code = library.dbi_open(txn, name.c_str(), create ? kCreate : 0, &db.handle);
    if (code != 0) library.txn_abort(txn);
    check(code, "dbi_open");
    check(library.txn_commit(txn), "txn_commit");  // of a reader too: an aborted one would close the handle
    return db;
  }

  py::dict stat() const {
    MDB_stat found{};
    check(library.env_stat(get(), &found), "env_stat");
    return py::dict(py::arg("psize") = found.ms_psize);
  }

  py::dict info() const {
    MDB_envinfo found{};
    check(library.env_info(get(), &found), "env_info");
    return py::dict(py::arg("map_size") = found.me_mapsize, py::arg("last_pgno") = found.me_last_pgno);
  }

  void set_mapsize(size_t size) { check(library.env_set_mapsize(get(), size), "env_set_mapsize"); }

  int reader_check() {
    int dead = 0;
    check(library.reader_check(get(), &dead), "reader_check");
    return dead;
  }

  void copy(const std::string& path) {
    MDB_env* env = get();
    const py::gil_scoped_release unlocked;
    check(library.env_copy(env, path.c_str()), "env_copy");
  }

 private:
  MDB_env* env_ = nullptr;
};

// Views of keys and values are valid until the transaction ends, in a writing one until its next write.
class Transaction {
 public:
  Transaction(std::shared_ptr<Environment> environment, Database db, bool write)
      : env_(std::move(environment)), db_(db) {
    MDB_env* env = env_->get();
    const py::gil_scoped_release unlocked;  // a writer waits for the one before it
    check(library.txn_begin(env, nullptr, write ? 0 : kReadOnly, &txn_), "txn_begin");
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  ~Transaction() { abort(); }

  void abort() {
    close_cursor();
    if (txn_ != nullptr) library.txn_abort(std::exchange(txn_, nullptr));
  }

  void commit() {
    close_cursor();
    MDB_txn* txn = std::exchange(txn_, nullptr);
    if (txn == nullptr) throw Error("the transaction has ended");
    const py::gil_scoped_release unlocked;
    check(library.txn_commit(txn), "txn_commit");
  }

  py::object get(std::string_view key, const Database* db) const {
    MDB_val name = value_of(key), value{};
    const int code = library.get(open(), handle(db), &name, &value);
    if (code == kNotFound) return py::none();
    check(code, "get");
    return view_of(value);
  }

  bool put(std::string_view key, const py::buffer& value, const Database* db) {
    const py::buffer_info info = value.request();
    MDB_val name = value_of(key), data{static_cast<size_t>(info.size * info.itemsize), info.ptr};
    check(library.put(open(), handle(db), &name, &data, 0), "put");
    return true;
  }

  bool remove(std::string_view key, const Database* db) {
    MDB_val name = value_of(key);
    const int code = library.del(open(), handle(db), &name, nullptr);
    if (code != kNotFound) check(code, "del");
    return code == 0;
  }

  py::dict stat(const Database& db) const {
    MDB_stat found{};
    check(library.stat(open(), db.handle, &found), "stat");
    return py::dict(py::arg("entries") = found.ms_entries);
  }

  // The one cursor of a transaction.
  MDB_cursor* cursor() {
    if (cursor_ == nullptr) check(library.cursor_open(open(), db_.handle, &cursor_), "cursor_open");
    return cursor_;
  }

  // Records under keys `[n, 16]`, of a user (the first 8 bytes) and a version. With `newest`, a user without the
  // version asked for gets the newest there is. `versions` are those of the records, -1 where there is none.
  void read_records(const Bytes& keys, bool newest, Sizes versions, Bytes headers, Bytes rows, Sizes sizes,
                    Checksums checksums) {
    const RecordSink sink(headers, rows, sizes, checksums);
    const auto n = static_cast<py::ssize_t>(sink.count);
    if (keys.ndim() != 2 || keys.shape(0) != n || keys.shape(1) != kKeyBytes || versions.ndim() != 1 ||
        versions.shape(0) != n || !versions.writeable())
      throw std::invalid_argument("keys must be [n, 16] and versions writable [n], for the n of rows");
    MDB_txn* txn = open();
    MDB_cursor* cursor = newest ? this->cursor() : nullptr;
    const char* key = reinterpret_cast<const char*>(keys.data());
    int64_t* version = versions.mutable_data();
    const py::gil_scoped_release unlocked;
    std::vector<RecordSource> sources(sink.count);
    for (size_t i = 0; i < sink.count; ++i, key += kKeyBytes) {
      MDB_val name{kKeyBytes, const_cast<char*>(key)}, value{};
      int code = library.get(txn, db_.handle, &name, &value);
      if (code == kNotFound && newest) code = find_newest(cursor, {key, kUserBytes}, name, value);
      version[i] = -1;
      if (code == kNotFound) continue;
      check(code, "get");
      version[i] = big_endian(static_cast<const char*>(name.mv_data) + kUserBytes);
      sources[i] = {static_cast<const char*>(value.mv_data), value.mv_size};
    }
    unpack_records(sources, sink, true);
  }

 private:
  static constexpr size_t kKeyBytes = 16, kUserBytes = 8;

  MDB_txn* open() const {
    if (txn_ == nullptr) throw Error("the transaction has ended");
    return txn_;
  }

  MDB_dbi handle(const Database* db) const { return db == nullptr ? db_.handle : db->handle; }

  void close_cursor() {
    if (cursor_ != nullptr) library.cursor_close(std::exchange(cursor_, nullptr));
  }

  // The last key of a user: the one before the first that would follow it.
  static int find_newest(MDB_cursor* cursor, std::string_view user, MDB_val& key, MDB_val& value) {
    const std::string behind = std::string(user) + std::string(kKeyBytes - kUserBytes, '\xff');
    key = value_of(behind);
    int code = library.cursor_get(cursor, &key, &value, kSetRange);
    if (code != 0 && code != kNotFound) return code;
    code = library.cursor_get(cursor, &key, &value, code == kNotFound ? kLast : kPrevious);
    if (code == 0 &&
        (key.mv_size != kKeyBytes || std::string_view(static_cast<char*>(key.mv_data), kUserBytes) != user))
      return kNotFound;
    return code;
  }

  static int64_t big_endian(const char* bytes) {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | static_cast<unsigned char>(bytes[i]);
    return static_cast<int64_t>(value);
  }

  std::shared_ptr<Environment> env_;
  Database db_;
  MDB_txn* txn_ = nullptr;
  MDB_cursor* cursor_ = nullptr;
};

class Cursor {
 public:
  explicit Cursor(std::shared_ptr<Transaction> txn) : txn_(std::move(txn)) {}

  bool set_range(std::string_view key) {
    key_ = value_of(key);
    return move(kSetRange);
  }

  bool move(CursorOp op) {
    const int code = library.cursor_get(txn_->cursor(), &key_, &value_, op);
    if (code != 0) key_ = value_ = MDB_val{};
    if (code != kNotFound) check(code, "cursor_get");
    return code == 0;
  }

  // Moves on to the next entry, which is what kNext means after a deletion.
  bool remove() {
    check(library.cursor_del(txn_->cursor(), 0), "cursor_del");
    return move(kNext);
  }

  py::object key() const { return key_.mv_data == nullptr ? py::object(py::bytes()) : py::object(view_of(key_)); }
  py::object value() const { return value_.mv_data == nullptr ? py::object(py::bytes()) : py::object(view_of(value_)); }

 private:
  std::shared_ptr<Transaction> txn_;
  MDB_val key_{}, value_{};
};

}  // namespace

void bind_lmdb(py::module_& module) {
  py::module_ m =
      module.def_submodule("lmdb", "liblmdb, once `load` has found it: the part of py-lmdb that a store needs.");
  const py::object& error = py::register_exception<Error>(m, "Error");
  py::register_exception<NotFoundError>(m, "NotFoundError", error);
  py::register_exception<MapFullError>(m, "MapFullError", error);
  py::register_exception<MapResizedError>(m, "MapResizedError", error);
  m.def("load", &load, py::arg("path"), py::arg("prefix"), "Take liblmdb 0.9 from a shared library; its version.");

  py::class_<Database>(m, "_Database");
  py::class_<Environment, std::shared_ptr<Environment>>(m, "Environment")
      .def("open_db", &Environment::open_db, py::arg("key"), py::arg("create") = true)
      .def(
          "begin",
          [](std::shared_ptr<Environment> env, Database db, bool write, bool) {
            return std::make_shared<Transaction>(std::move(env), db, write);
          },
          py::arg("db"), py::arg("write") = false, py::arg("buffers") = true)
      .def("stat", &Environment::stat)
      .def("info", &Environment::info)
      .def("set_mapsize", &Environment::set_mapsize)
      .def("reader_check", &Environment::reader_check)
      .def("copy", &Environment::copy)
      .def("close", &Environment::close);
  m.def(
      "open",
      [](const std::string& path, size_t map_size, unsigned int max_dbs, unsigned int max_readers, bool readonly,
         bool) { return std::make_shared<Environment>(path, map_size, max_dbs, max_readers, readonly); },
      py::arg("path"), py::arg("map_size"), py::arg("max_dbs"), py::arg("max_readers") = 126,
      py::arg("readonly") = false, py::arg("create") = true);
  py::class_<Transaction, std::shared_ptr<Transaction>>(m, "Transaction")
      .def("get", &Transaction::get, py::arg("key"), py::arg("db") = nullptr)
      .def("put", &Transaction::put, py::arg("key"), py::arg("value"), py::arg("db") = nullptr)
      .def("delete", &Transaction::remove, py::arg("key"), py::arg("db") = nullptr)
      .def("stat", &Transaction::stat)
      .def("cursor", [](std::shared_ptr<Transaction> txn) { return Cursor(std::move(txn)); })
      .def("read_records", &Transaction::read_records, py::arg("keys").noconvert(), py::arg("newest"),
           py::arg("versions").noconvert(), py::arg("headers").noconvert(), py::arg("rows").noconvert(),
           py::arg("sizes").noconvert(), py::arg("checksums").noconvert())
      .def("__enter__", [](std::shared_ptr<Transaction> txn) { return txn; })
      .def("__exit__", [](Transaction& txn, const py::object& type, const py::object&, const py::object&) {
        type.is_none() ? txn.commit() : txn.abort();
      });
  py::class_<Cursor>(m, "Cursor")
      .def("set_range", &Cursor::set_range)
      .def("first", [](Cursor& cursor) { return cursor.move(kFirst); })
      .def("last", [](Cursor& cursor) { return cursor.move(kLast); })
      .def("next", [](Cursor& cursor) { return cursor.move(kNext); })
      .def("prev", [](Cursor& cursor) { return cursor.move(kPrevious); })
      .def("delete", &Cursor::remove)
      .def("key", &Cursor::key)
      .def("value", &Cursor::value);
}

}  // namespace vista::host
