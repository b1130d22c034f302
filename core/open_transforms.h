#ifndef TORCHLIFT_CORE_OPEN_TRANSFORMS_H_
#define TORCHLIFT_CORE_OPEN_TRANSFORMS_H_

// File: core/open_transforms.h
//
// The transforms at work on this thread, for messages. Levels tell of themselves (core/level.h);
// those that push none (grad, vjp, the outermost jvp) leave a mark here while their function runs.
//
//   describe_open_transforms()   // "vmap level 2 (size 8) inside reverse mode"

#include <string>

namespace torchlift {

// mode: "reverse mode", a literal. To be closed in reverse order, on the same thread.
void note_transform_opened(const char* mode);
void note_transform_closed();

// Innermost first; empty where none is open.
std::string describe_open_transforms();

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_OPEN_TRANSFORMS_H_
