#ifndef TORCHLIFT_NN_FUNCTIONAL_RESET_PARAMETERS_H_
#define TORCHLIFT_NN_FUNCTIONAL_RESET_PARAMETERS_H_

// File: nn_functional/reset_parameters.h
//
// Initial values for a module's parameters, as its classes' constructors draw them. Not for users.

namespace torch::nn {
class Module;
}

namespace torchlift {

// Calls reset_parameters() of the module and of all in it, the inner ones first, as their
// constructors do. libtorch's modules have no common base with that function: the classes of
// torch::nn are known here. Throws TransformError, before anything is changed, if another class has
// parameters of its own.
void reset_all_parameters(torch::nn::Module& root);

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_RESET_PARAMETERS_H_
