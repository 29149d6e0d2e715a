// The Python module emr_kernels._C: facts about this build. It calls no operator and links no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> names;
  std::istringstream in(list);
  for (std::string name; std::getline(in, name, ';');) {
    names.push_back(name);
  }
  return names;
}

pybind11::dict facts() {
  pybind11::dict d;
  d["version"] = EMR_VERSION;
  d["torch"] = EMR_BUILT_WITH_TORCH;
  d["compiler"] = compiler();
  d["instruction_sets"] = std::vector<std::string>(emr::kIsaNames, emr::kIsaNames + emr::kIsaCount);
  d["instruction_set"] = emr::kIsaNames[static_cast<int>(emr::chosen_isa())];
  d["cuda_architectures"] = split(EMR_CUDA_ARCHITECTURES);
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about how the compiled operators were built.";
  m.def("facts", &facts, "Versions, compiler, instruction sets compiled in and chosen, architectures of the CUDA kernels.");
}
