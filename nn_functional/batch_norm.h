#ifndef TORCHLIFT_NN_FUNCTIONAL_BATCH_NORM_H_
#define TORCHLIFT_NN_FUNCTIONAL_BATCH_NORM_H_

// File: nn_functional/batch_norm.h
//
// BatchNorm under transforms. In training mode it writes running statistics; under vmap each
// example has statistics of its own, which do not fit into buffers that all share. Ways out:
//
//   tl::functional_call(net, state, tl::ReturnBuffers{}, x)     // returns them: buffers.h
//   tl::replace_all_batch_norm_modules_(*net);                  // does without them
//   tl::patch_batch_norm_with(*net, [](torch::nn::Module& norm) {        // uses another norm
//     return torch::nn::AnyModule(torch::nn::GroupNorm(4, tl::num_features(norm)));
//   });
//   net->eval();

#include <cstdint>
#include <functional>

namespace torch::nn {
class AnyModule;
class Module;
}  // namespace torch::nn

namespace torchlift {

// Makes every BatchNorm1d, 2d and 3d in root (or root itself) use the statistics of its batch only,
// in place: track_running_stats is false, and the buffers are gone.
void replace_all_batch_norm_modules_(torch::nn::Module& root);

// The channels of a BatchNorm. Throws TransformError for other modules.
int64_t num_features(const torch::nn::Module& norm);

using MakeNorm = std::function<torch::nn::AnyModule(torch::nn::Module& norm)>;

// Puts make(norm) in the place of every BatchNorm in root that a Sequential, ModuleList or
// ModuleDict holds, in place and in the same mode (train, eval). A norm that several of them hold
// is replaced by one module.
//
// Throws TransformError, before anything is changed, if another module holds a BatchNorm: it keeps
// the norm in a member that only its own code can set. Set that one there, or use
// replace_all_batch_norm_modules_.
void patch_batch_norm_with(torch::nn::Module& root, const MakeNorm& make);

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_BATCH_NORM_H_
