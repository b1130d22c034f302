#ifndef TORCHLIFT_COMPILE_IMPORT_RECORDED_H_
#define TORCHLIFT_COMPILE_IMPORT_RECORDED_H_

// File: compile/import/recorded.h
//
// What torch computed in Python with the models of testdata/ (testdata/write_testdata.py), for
// tests.
//
//   const Recorded recorded("mlp");
//   expect_recorded(load_exported(model_path("mlp.pt2")), recorded);

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "compile/artifact/safetensors.h"
#include "compile/import/imported_module.h"
#include "core/testing.h"

namespace torchlift::compile {

inline std::string model_path(const std::string& file) { return "compile/import/testdata/" + file; }

struct Recorded {
  explicit Recorded(const std::string& model) {
    std::map<std::string, at::Tensor> all;
    for (const auto& [name, t] : load_safetensors(model_path(model + ".safetensors")))
      all[name] = t;
    inputs = numbered(all, "input.");
    outputs = numbered(all, "output.");
    for (const auto& [name, t] : all) {
      if (name.rfind("buffer.", 0) == 0) buffers[name.substr(7)] = t;
    }
  }

  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> outputs;
  ModuleState buffers;  // after the call

 private:
  static std::vector<at::Tensor> numbered(const std::map<std::string, at::Tensor>& all,
                                          const std::string& prefix) {
    std::vector<at::Tensor> tensors;
    while (true) {
      const auto found = all.find(prefix + std::to_string(tensors.size()));
      if (found == all.end()) return tensors;
      tensors.push_back(found->second);
    }
  }
};

inline void expect_same(const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].scalar_type(), wanted[i].scalar_type());
    EXPECT_CLOSE(got[i], wanted[i]);
  }
}

// The outputs, and what the call writes into buffers.
inline void expect_recorded(const ImportedModule& model, const Recorded& recorded) {
  const auto [outputs, buffers] = model({}, ReturnBuffers{}, recorded.inputs);
  expect_same(outputs, recorded.outputs);
  ASSERT_EQ(buffers.size(), recorded.buffers.size());
  for (const auto& [name, buffer] : recorded.buffers) EXPECT_CLOSE(buffers.at(name), buffer);
}

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_RECORDED_H_
