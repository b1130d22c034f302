#ifndef TORCHLIFT_COMPILE_HOLLOW_H_
#define TORCHLIFT_COMPILE_HOLLOW_H_

// File: compile/hollow.h
//
// Tensors that have everything but memory. Not for users; see NOTE [tracing by shapes] in
// compile/trace_scope.h.
//
//   at::Tensor x = hollow_like(at::empty({8, 3}, at::kMeta), c10::kCPU);  // says that it is on CPU
//   x.t();                                                                // a view of it
//   call_on_shapes(mul, "trace", &stack);   // of hollow tensors, gives hollow ones
//
// NOTE [hollow tensors]
// A hollow tensor has the sizes, strides, dtype, device and dispatch keys of an ordinary one, and a
// storage of the right number of bytes that holds none, and complains to whoever reads it. So
// everything that looks at a tensor without reading it works as it is: libtorch's views (which
// share the storage), formulas of derivatives that choose by device, questions about metadata.
// Kernels that compute are those of the meta device, on meta tensors that take the place of the
// arguments for the time of one call. A C++ program has no such kernel for many operators, and
// Python for a few: then the real one runs on zeros, if the arguments are small (64 MiB).

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <string>

namespace c10 {
class OperatorHandle;
}

namespace torchlift::compile {

at::Tensor hollow_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                         c10::Device device);

// Of the sizes, strides and dtype of t, which is strided; of all its memory.
at::Tensor hollow_like(const at::Tensor& t, c10::Device device);

// Whether t has no memory: a plain tensor, or the value in one of a level.
bool is_hollow(const at::Tensor& t);

// Calls op on the stack's arguments, which may be hollow tensors and ordinary ones. Results are
// hollow; those that share memory with an argument, by the kernel, share it here too. Nothing is
// read, and nothing is written but the sizes of arguments that the operator resizes.
//
// Throws UnsupportedError, with the name of the operator, where libtorch has no meta kernel for it
// and the arguments are large, for arguments that are not strided, and for tensors on several
// devices where it is not known to take them; else what the operator throws.
void call_on_shapes(const c10::OperatorHandle& op, const std::string& transform,
                    torch::jit::Stack* stack);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_HOLLOW_H_
