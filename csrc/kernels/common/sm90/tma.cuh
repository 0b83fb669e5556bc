// Tiles of row-major matrices by the tensor memory accelerator; tensor_map.h describes the matrix.
//
// The map is a kernel parameter, `const __grid_constant__ CUtensorMap map`. One thread issues a copy. A tile starts at
// a multiple of 1024 bytes of shared memory and has one 128-byte line (64 elements) for each row, swizzled as wgmma
// reads it. What lies outside the matrix comes as zeros, counts as bytes and is not written.
#pragma once

#include <cuda.h>

#include "barrier.cuh"

namespace vista::cuda::sm90 {

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box of the map whose upper left element is (row, column). `done` gets its bytes.
__device__ inline void load_tile(void* tile, const CUtensorMap& map, int row, int column, Barrier& done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(tile)),
      "l"(&map), "r"(column), "r"(row), "r"(done.address())
      : "memory");
}

// publish_stores() by the threads that wrote the tile, and a barrier, come before; commit_stores() after.
__device__ inline void store_tile(const CUtensorMap& map, int row, int column, const void* tile) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(column), "r"(row), "r"(shared_address(tile))
               : "memory");
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but kLeft of this thread's groups of stores have read their tiles, which may then be overwritten.
template <int kLeft>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

// Byte of a tile where an element of 2 bytes lies, for threads that read or write it themselves: column < 64.
__device__ inline int swizzled(int row, int column) { return row * 128 + ((column * 2) ^ (row % 8 * 16)); }

}  // namespace vista::cuda::sm90
