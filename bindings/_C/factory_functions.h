#ifndef TORCHLIFT_BINDINGS_C_FACTORY_FUNCTIONS_H_
#define TORCHLIFT_BINDINGS_C_FACTORY_FUNCTIONS_H_

// File: bindings/_C/factory_functions.h
//
// NOTE [torch.empty inside vmap]
// What f makes must be a tensor of the level, so that batched values can be written into it (see
// NOTE [promotion] in core/promotion.h). The operators see to that where they can (NOTE [factories]
// in core/factory.cc), but torch.empty, torch.zeros and their like call them just as kernels do. So
// these built-in functions get a new body when torchlift is imported: it calls the old one, and
// makes what that returns a tensor of the levels open on the calling thread. Where there is none,
// it costs a look at a thread-local. (x.new() and x.new_tensor() get one, too, since they ask x for
// a backend, of which a lifted tensor has none.)
//
// The function objects stay the same, so it makes no difference how f came by them (from torch
// import empty), and nobody who compares, pickles or looks them up sees a change. Replacing the
// names in the module, which was done first, fails in all of these, and meets other threads.

namespace torchlift::python {

// Sees to that; to be called once.
void lift_in_factory_functions();

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_FACTORY_FUNCTIONS_H_
