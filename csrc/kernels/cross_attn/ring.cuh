// Tiles in shared memory that take turns.
#pragma once

#include "../common/async_copy.cuh"

namespace vista::cuda {

// Step s is in place s % kPlaces; kPlaces - 1 steps are under way. copy(step, place) begins to bring a step, by all
// threads; it is asked for some steps behind the last.
template <int kPlaces, class Copy>
class Ring {
 public:
  __device__ explicit Ring(const Copy& copy) : copy_(copy) {
#pragma unroll 1
    for (int step = 0; step < kPlaces - 1; ++step) fill(step);
  }

  // By all threads, step by step.
  __device__ int arrive(int step) {
    wait_copies<kPlaces - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the one before it any more
    fill(step + kPlaces - 1);
    return place_of(step);
  }

  static __device__ int place_of(int step) { return step % kPlaces; }

 private:
  const Copy& copy_;

  __device__ void fill(int step) {
    copy_(step, place_of(step));
    commit_copies();
  }
};

}  // namespace vista::cuda
