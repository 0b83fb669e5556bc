// How the parts of a warp-specialised block tell each other: mbarriers, rings of stages, named barriers.
#pragma once

#include "../async_copy.cuh"

namespace vista::cuda::sm90 {

// An mbarrier in shared memory. A phase ends when the threads it was made for have arrived and every byte that they
// announced has landed; phases alternate in parity, from 0.
struct alignas(8) Barrier {
  uint64_t opaque;

  __device__ uint32_t address() const { return shared_address(this); }

  // By one thread; publish_barriers() and a barrier of the block before anybody else uses it.
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }

  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }

  // Arrives, and announces the bytes that asynchronous copies will report to this phase.
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  // Until the phase of this parity has ended. At the start the one before phase 0, of parity 1, counts as ended.
  __device__ void wait(uint32_t parity) const {
    while (!try_wait(parity)) {
    }
  }

 private:
  __device__ bool try_wait(uint32_t parity) const {
    uint32_t ended;
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(address()), "r"(parity)
        : "memory");
    return ended;
  }
};

// Shows freshly made barriers to the asynchronous copies.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Before wgmma or a TMA store reads what this thread has written to shared memory with ordinary stores, and before the
// barrier that tells the thread which issues them.
__device__ inline void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where a party stands in a ring of stages.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // The stage of the turn before.
  __device__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// kStages tiles between one producer thread and its consumers. Each side walks it with a Turn:
//
//   producer  ring.acquire(turn, bytes); load_tile(..., ring.full[turn.stage]); turn.next();
//   consumer  ring.full[turn.stage].wait(turn.parity); read the tile; ring.empty[turn.stage].arrive(); turn.next();
template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  // By one thread. `consumers`: how many arrivals release a stage.
  __device__ void init(int consumers) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
      empty[stage].init(consumers);
    }
  }

  // Waits until the stage is free and announces what will fill it.
  __device__ void acquire(const Turn<kStages>& turn, int bytes) {
    empty[turn.stage].wait(turn.parity ^ 1);
    full[turn.stage].arrive_expecting(bytes);
  }
};

// A barrier of some warps of the block: `threads` of them, by a number from 1 to 15. __syncthreads has 0.
__device__ inline void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers of every thread of the warpgroup from here on, a multiple of 8 from 24 to 240. All warpgroups together may
// not come to hold more than the kernel was launched with.
template <int kRegisters>
__device__ inline void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// True in one lane of a warp that is here as a whole.
__device__ inline bool elected() {
  uint32_t me;
  asm volatile("{\n.reg .pred me;\nelect.sync _|me, 0xffffffff;\nselp.u32 %0, 1, 0, me;\n}" : "=r"(me));
  return me;
}

}  // namespace vista::cuda::sm90
