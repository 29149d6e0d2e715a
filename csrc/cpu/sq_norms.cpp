// sq_norms on the CPU.
#include <algorithm>
#include <vector>

#include "../samples.h"
#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {
namespace {

struct Source {
  const char* data;
  int64_t stride;  // bytes from sample to sample
  int64_t size;    // elements of a sample
  int64_t blocks;  // in a sample
  SquareSum sum;
};

Source source_of(const Tensor& t, int64_t batch) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == batch, "expected tensors [N, ...] of one N");
  STD_TORCH_CHECK(dense_samples(t), "expected tensors whose samples are dense");
  const int64_t size = batch == 0 ? 0 : t.numel() / batch;
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  return {data, t.stride(0) * bytes, size, (size + kBlock - 1) / kBlock, kernel_set().square_sum(dtype_of(t))};
}

template <class A>
void write_sums(const std::vector<Source>& sources, const std::vector<double>& parts, int64_t batch, A* result) {
  const double* part = parts.data();
  for (const Source& s : sources) {
    for (int64_t n = 0; n < batch; ++n, part += s.blocks) {
      double sum = 0;
      for (int64_t b = 0; b < s.blocks; ++b) {
        sum += part[b];
      }
      *result++ = static_cast<A>(sum);
    }
  }
}

}  // namespace

Tensor sq_norms(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 1, "expected at least one tensor [N, ...]");
  const int64_t batch = tensors[0].size(0);
  std::vector<Source> sources;
  std::vector<int64_t> starts;  // of each tensor's blocks, among all
  int64_t blocks = 0, elements = 0;
  bool wide = false;
  for (const Tensor& t : tensors) {
    sources.push_back(source_of(t, batch));
    starts.push_back(blocks);
    blocks += sources.back().blocks * batch;
    elements += sources.back().size * batch;
    wide = wide || t.scalar_type() == ScalarType::Double;
  }
  const auto rows = static_cast<int64_t>(tensors.size());
  Tensor result = torch::stable::new_empty(tensors[0], {rows, batch}, wide ? ScalarType::Double : ScalarType::Float);
  std::vector<double> parts(blocks);
  const int64_t grain = blocks == 0 ? 1 : std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(1, elements / blocks));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    auto which = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (which + 1 < rows && starts[which + 1] <= i) {
        ++which;
      }
      const Source& s = sources[which];
      const int64_t n = (i - starts[which]) / s.blocks, first = (i - starts[which]) % s.blocks * kBlock;
      parts[i] = s.sum(s.data + n * s.stride, first, std::min(first + kBlock, s.size));
    }
  });
  if (wide) {
    write_sums(sources, parts, batch, static_cast<double*>(result.mutable_data_ptr()));
  } else {
    write_sums(sources, parts, batch, static_cast<float*>(result.mutable_data_ptr()));
  }
  return result;
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("sq_norms", TORCH_BOX(&emr::cpu::sq_norms));
}
