// The pybind11 module `_C`. Loading it registers torch.ops.specextend.* (csrc/ops/*.cpp); the
// module itself says what was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "cpu/built_isas.h"
#include "cpu/isa.h"
#include "mapping.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "device_memory.h"
#include "stream.h"
#endif

namespace py = pybind11;

namespace {

using namespace specextend;

py::dict plan_attention(int num_rows, int num_heads, int num_kv_heads, int head_dim,
                        std::optional<int> values, int64_t prefix_len, int batch,
                        const std::string& dtype, int chunk_size, int multiprocessors,
                        int shared_bytes, int major, int minor) {
  const int value_dim = values.value_or(head_dim);
  const int least =
      std::min({num_rows, num_heads, num_kv_heads, head_dim, value_dim, batch, multiprocessors});
  if (least < 1 || prefix_len < 0 || chunk_size < 0 || head_dim > kMaxHeadDim ||
      value_dim > kMaxValueDim || num_heads % std::max(num_kv_heads, 1) != 0) {
    throw std::invalid_argument("plan_attention: sizes must be positive, head_dim at most " +
                                std::to_string(kMaxHeadDim) + ", value_dim at most " +
                                std::to_string(kMaxValueDim) +
                                ", num_heads a multiple of num_kv_heads");
  }
  if (dtype != "fp32" && dtype != "fp16" && dtype != "bf16") {
    throw std::invalid_argument("plan_attention: dtype must be fp32, fp16 or bf16, got " + dtype);
  }
  const DType type = dtype == "fp32"   ? DType::kFloat32
                     : dtype == "fp16" ? DType::kFloat16
                                       : DType::kBFloat16;
  float chunks = 0, out = 0;  // that there are some is all that counts
  TreeAttentionParams p{};
  p.batch = batch, p.num_rows = p.num_tree_keys = num_rows;
  p.num_heads = num_heads, p.num_kv_heads = num_kv_heads, p.head_dim = head_dim;
  p.value_dim = value_dim, p.out = &out;
  p.capacity = prefix_len + num_rows;
  p.chunk_size = chunk_size, p.chunk_lse = chunk_size > 0 ? &chunks : nullptr;
  const GpuLimits gpu{multiprocessors, shared_bytes, major, minor};
  const bool hopper = major == 9 && minor == 0 && hopper_serves(p, type);
  const WorkCut cut = hopper ? hopper_cut(p, gpu) : portable_cut(p, type, gpu);
  const WorkTotals total = total_work(cut, {0, p.capacity});
  const int cluster = hopper ? hopper_cluster(p) : 1;
  const int at_once = multiprocessors * (hopper ? 1 : portable_blocks_per_sm(p, type, gpu));
  py::dict plan;
  plan["family"] = hopper ? "hopper" : "portable";
  plan["packed_rows"] = packed_rows(p);
  plan["padded_rows"] = cut.row_blocks * cut.rows_per_block;
  plan["tile_keys"] = cut.tile_keys;
  plan["units"] = int64_t(batch) * units_per_sequence(cut);
  plan["cluster"] = cluster;
  plan["grid"] = cut.grid * cluster;
  plan["busy"] = total.busy * cluster;
  plan["waves"] = double(cut.grid * cluster) / at_once;
  plan["min_run"] = cut.min_run;
  plan["run"] = total.run;
  plan["partials"] = total.partials;
  plan["most_partials"] = total.most;
  plan["partial_rows"] = total.partials * cut.rows_per_block;
  return plan;
}

std::unique_ptr<Mapping> map_file(int file,
                                  const std::vector<std::tuple<int64_t, int64_t, int64_t>>& pieces,
                                  int64_t size, bool shared) {
  std::vector<MappedPiece> parts;
  for (const auto& [at, offset, bytes] : pieces) {
    if (at < 0 || bytes < 1 || at > size - bytes) {
      throw std::invalid_argument("Mapping: a piece must lie in the " + std::to_string(size) +
                                  " bytes, got " + std::to_string(bytes) + " at " +
                                  std::to_string(at));
    }
    parts.push_back({at, offset, bytes});
  }
  try {
    return std::make_unique<Mapping>(file, parts, size, shared);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

#ifdef SPECEXTEND_HAS_CUDA
// For specextend/device_memory.py. Sizes are in bytes, memory and addresses are integers.
void bind_device_memory(py::module_& m) {
  const auto free = py::call_guard<py::gil_scoped_release>();  // they may wait for the device
  m.def("memory_granularity", &memory_granularity, py::arg("device"), free,
        "What sizes of device memory are multiples of; 0: the device cannot map memory.");
  m.def("create_memory", &create_memory, py::arg("device"), py::arg("bytes"), free,
        "Physical memory, which holds anything; None: there is not enough.");
  m.def("release_memory", &release_memory, py::arg("memory"), free,
        "Gives up memory, which is free once it is mapped nowhere.");
  m.def("reserve_addresses", &reserve_addresses, py::arg("bytes"), free,
        "A range of addresses with nothing behind it.");
  m.def("free_addresses", &free_addresses, py::arg("begin"), py::arg("bytes"), free,
        "Gives up a range into which nothing is mapped any more.");
  m.def("map_memory", &map_memory, py::arg("device"), py::arg("begin"), py::arg("bytes"),
        py::arg("memory"), free, "Maps all of a memory to where nothing is mapped.");
  m.def("unmap_memory", &unmap_memory, py::arg("device"), py::arg("begin"), py::arg("bytes"), free,
        "Waits for the device, and takes away what one call of map_memory has mapped.");
  m.def("is_captured", &is_captured, py::arg("device"), free,
        "Whether torch's current stream of the device is being captured.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of specextend. Importing it registers torch.ops.specextend.*";
  m.attr("version") = SPECEXTEND_VERSION;
  m.attr("torch_version") = SPECEXTEND_TORCH_VERSION;  // that of the headers it was built with
#ifdef SPECEXTEND_HAS_CUDA
  m.attr("has_cuda") = true;
  m.def(
      "create_stream",
      [](int32_t device) { return reinterpret_cast<uintptr_t>(create_stream(device)); },
      py::arg("device"),
      "A CUDA stream that torch hands out to nobody, for torch.cuda.ExternalStream.");
  bind_device_memory(m);
  m.attr("cuda_archs") = std::string(SPECEXTEND_CUDA_ARCHS);
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = std::string();
#endif
#ifdef SPECEXTEND_HAS_SM90A
  m.attr("has_sm90a") = true;
#else
  m.attr("has_sm90a") = false;
#endif
  m.def("plan_attention", &plan_attention, py::kw_only(), py::arg("num_rows"), py::arg("num_heads"),
        py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("value_dim") = py::none(),
        py::arg("prefix_len"), py::arg("batch") = 1, py::arg("dtype") = "bf16",
        py::arg("chunk_size") = 0, py::arg("multiprocessors") = 132,
        py::arg("shared_bytes") = 228 * 1024, py::arg("major") = 9, py::arg("minor") = 0,
        R"(How tree_attention lays out a call on a GPU, by default one like the H200; needs none.

num_rows: rows of the tree, the root included; all sequences have prefix_len keys before it.
value_dim: of values, if it is another than head_dim, that of keys.
shared_bytes: shared memory of a multiprocessor. major, minor: compute capability.

Returns a dict: family ("hopper" or "portable"); packed_rows of a KV head (num_rows x group) and
padded_rows, which are computed; tile_keys; units, row blocks of KV heads, each of which passes
over the keys; cluster, the blocks that share a pass; grid, the blocks that are launched, busy,
those that get work, and waves, the grid in units of what the GPU holds at a time; run, the tiles
that a cluster gets at most, being begun counted as two, and min_run, which it gets at least;
partials, results that the combine puts together, most_partials, those of one unit, and
partial_rows, their rows.)");
  py::class_<Mapping>(m, "Mapping", py::buffer_protocol(),
                      R"(Memory with pieces of a file in it, as a buffer; zeros elsewhere.

file: a descriptor, which may be closed afterwards. pieces: (at, offset, bytes) each, multiples of
the page: where in the memory, where in the file, how much. size: of the memory, in bytes.
shared: what is written goes to the file; else pages that are written to become copies of its own.

Raises OSError where the system refuses, and ValueError for a piece beyond the memory.)")
      .def(py::init(&map_file), py::arg("file"), py::arg("pieces"), py::kw_only(), py::arg("size"),
           py::arg("shared"))
      .def_buffer([](Mapping& self) {
        return py::buffer_info(static_cast<uint8_t*>(self.data()), self.size());
      });
  m.def("cpu_isas", &specextend::cpu::built_isas,
        "CPU instruction sets with kernels in this module.");
  m.def(
      "cpu_isa", [] { return std::string(specextend::cpu::isa().name); },
      "The instruction set in use: the best this machine has, or SPECEXTEND_CPU_ISA.");
}
