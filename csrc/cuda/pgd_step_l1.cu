// pgd_step under L1 on a GPU: one block for each sample, which finds its two thresholds by bisection over their bits.
#include "pgd_step.cuh"

namespace emr::cuda {
namespace {

constexpr int kMostThreads = 512;
// Numbers tried at once: four bits of a threshold for each pass over the sample.
constexpr int kTrials = 16;
constexpr uint32_t kLargest = 0x7fffffff;

// Lane l of every warp gets the sum over the block of everyone's values[l % kTrials]. `scratch` has room for kTrials
// values from each warp, and may be used again after the next but one __syncthreads().
template <class A>
__device__ __forceinline__ A sum_trials(A (&values)[kTrials], A* scratch) {
  const int lane = threadIdx.x % kWarp;
  // Each step halves what a lane is in charge of: it gives away one half and gets its share of the other.
#pragma unroll
  for (int half = kTrials / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A given = upper ? values[i] : values[i + half];
      const A kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  values[0] += __shfl_xor_sync(0xffffffffu, values[0], kTrials);
  if (lane < kTrials) {
    scratch[threadIdx.x / kWarp * kTrials + lane] = values[0];
  }
  __syncthreads();
  A total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    total += scratch[w * kTrials + lane % kTrials];
  }
  return total;
}

// The least number >= 0 for which a condition, true up to some number and false beyond, is false. The bits of such
// numbers order them.
struct Threshold {
  int64_t last = -1;  // the largest number tried for which the condition held

  __device__ __forceinline__ uint32_t trial(int digit, int place) const {
    const int64_t bits = (last < 0 ? 0 : last) + (static_cast<int64_t>(digit) << place);
    return bits < kLargest ? static_cast<uint32_t>(bits) : kLargest;
  }
  // `holds`: in lane l, whether the condition holds for trial l % kTrials.
  __device__ __forceinline__ void narrow(bool holds, int place) {
    const unsigned held = __ballot_sync(0xffffffffu, holds) & ((1u << kTrials) - 1);
    if (held != 0) {
      last = trial(31 - __clz(held), place);
    }
  }
  // `place`: of the lowest bit tried.
  __device__ __forceinline__ float value(int place) const {
    return last < 0 ? 0.0f : __uint_as_float(static_cast<uint32_t>(last) + (1u << place));
  }
};

// The lowest place, in steps of four, of the bits of float32 that values of a dtype use.
template <class G>
constexpr int kLowest = sizeof(G) == 4 ? 0 : std::is_same_v<G, bf16> ? 16 : 12;

template <class X, class G, int C, bool resident>
__global__ void __launch_bounds__(kMostThreads, 1) l1_kernel(const StepArguments s) {
  constexpr int kFirst = 28;
  __shared__ int counts[2][kMostThreads / kWarp * kTrials];
  __shared__ float sums[2][kMostThreads / kWarp * kTrials];
  const int64_t n = blockIdx.x;
  const Sample<X, G, C, resident> sample(s, n);

  // The count-th largest magnitude is the least number with fewer magnitudes above it.
  const int64_t wanted = s.counts ? s.counts[n] : s.count;
  Threshold magnitude;
  int moved = 0;
  bool undefined = false;
  // Unrolled, its few passes would keep their counts in memory.
#pragma unroll 1
  for (int place = kFirst; place >= kLowest<G>; place -= 4) {
    int above[kTrials] = {};
    sample.each([&](const Chunk<C>& c) {
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const uint32_t bits = __float_as_uint(c.gradient[k]) & kLargest;
        undefined = undefined || c.gradient[k] != c.gradient[k];
#pragma unroll
        for (int d = 0; d < kTrials; ++d) {
          above[d] += bits > magnitude.trial(d, place);
        }
      }
    });
    const int total = sum_trials(above, counts[place / 4 % 2]);
    const unsigned held = __ballot_sync(0xffffffffu, total >= wanted) & ((1u << kTrials) - 1);
    // How many are above the last number that held; above zero, if none does.
    if (held != 0 || place == kFirst) {
      moved = __shfl_sync(0xffffffffu, total, held == 0 ? 0 : 31 - __clz(held));
    }
    magnitude.narrow(total >= wanted, place);
  }
  const float least = magnitude.value(kLowest<G>);
  const float a = (s.step_sizes ? s.step_sizes[n] : s.step_size) / static_cast<float>(moved > 1 ? moved : 1);

  // The cut is the least number that brings the sum of the excesses down to epsilon.
  Threshold threshold;
  for (int place = kFirst; place >= 0; place -= 4) {
    float cuts[kTrials], excess[kTrials] = {};
#pragma unroll
    for (int d = 0; d < kTrials; ++d) {
      cuts[d] = __uint_as_float(threshold.trial(d, place));
    }
    sample.each([&](const Chunk<C>& c) {
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const float delta = l1_step(c.x[k], c.gradient[k], a, least) - c.origin[k];
        undefined = undefined || delta != delta;
        const float room = l1_room(delta, c.origin[k], s.lower, s.upper);
#pragma unroll
        for (int d = 0; d < kTrials; ++d) {
          excess[d] += l1_excess(fabsf(delta), room, cuts[d]);
        }
      }
    });
    threshold.narrow(sum_trials(excess, sums[place / 4 % 2]) > s.epsilon, place);
  }
  // A NaN makes the whole sample one.
  const float cut = __syncthreads_or(undefined) ? __int_as_float(0x7fc00000) : threshold.value(0);
  sample.write_each([&](float x, float origin, float g) {
    const float t = l1_step(x, g, a, least);
    return cut == 0 ? clamped(t, s.lower, s.upper) : l1_project(t, origin, cut, s.lower, s.upper);
  });
}

}  // namespace

void launch_l1(const Tensor& x, const Tensor& gradient, const StepArguments& s, cudaStream_t stream) {
  STD_TORCH_CHECK(s.size <= std::numeric_limits<int32_t>::max(), "a sample too large for the counts of one block");
  by_dtypes(x, gradient, [&](auto* px, auto* pg) {
    using X = std::remove_pointer_t<decltype(px)>;
    using G = std::remove_pointer_t<decltype(pg)>;
    const unsigned blocks = blocks_for(s.samples, 1);
    // Sixteen trials for each element: the arithmetic hides the loads, so a sample that does not fit into registers is
    // read element by element.
    if (is_chunked(s, s.size) && s.size <= kMostThreads * kChunk) {
      l1_kernel<X, G, kChunk, true><<<blocks, threads_for<kChunk>(s, kMostThreads), 0, stream>>>(s);
    } else {
      l1_kernel<X, G, 1, false><<<blocks, threads_for<1>(s, kMostThreads), 0, stream>>>(s);
    }
  });
  check_launch("pgd_step (l1)");
}

}  // namespace emr::cuda
