#ifndef TORCHLIFT_COMPILE_ARTIFACT_NATIVE_CODE_H_
#define TORCHLIFT_COMPILE_ARTIFACT_NATIVE_CODE_H_

// File: compile/artifact/native_code.h
//
// Machine code of a program: a package of torch's AOTInductor, as an artifact holds it.
//
//   const NativeCode code = native_code_for_here(package);   // to be saved
//   const NativeLibrary library(code);                       // runs code of the package
//   std::vector<at::Tensor> results = library.run(inputs);
//
// Whoever makes a NativeLibrary trusts the package: it is a shared library, which does what it
// wants. A checksum tells damage from what was written, not harm from good will.

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace torchlift::compile {

struct NativeCode {
  std::string backend;  // who made it: "inductor"
  // What it was made with, and for: machine code fits nothing else.
  std::string torchlift_version;
  std::string torch_version;
  std::string machine;                    // "x86_64"
  std::vector<std::string> cpu_features;  // that the machine had: "avx2"
  at::Tensor package;                     // uint8 on the CPU: the bytes of a .pt2 file
};

// A package that was made on this machine, by Inductor.
NativeCode native_code_for_here(at::Tensor package);

// Throws FormatError, which says what does not fit, if it cannot run here.
void check_fits_here(const NativeCode& code);

class NativeLibrary {
 public:
  // Writes the library into a temporary file, and loads it. Throws FormatError if it does not fit
  // this machine, or cannot be loaded.
  explicit NativeLibrary(const NativeCode& code);
  ~NativeLibrary();
  NativeLibrary(const NativeLibrary&) = delete;
  NativeLibrary& operator=(const NativeLibrary&) = delete;

  // Of contiguous or strided tensors just as it was compiled for: it does not check. Can be called
  // from several threads, which take turns.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const;

 private:
  struct Loader;
  std::unique_ptr<Loader> loader_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_NATIVE_CODE_H_
