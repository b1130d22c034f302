#ifndef TORCHLIFT_BATCHING_TESTING_CALL_OP_H_
#define TORCHLIFT_BATCHING_TESTING_CALL_OP_H_

// File: batching/testing/call_op.h
//
// Calls operators by name, so that a test can go through a table of them:
//
//   call_op("aten::add.Tensor", {a, b})     alpha takes its default

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

namespace torchlift::testing {

// The tensors that the operator returns, those of a list one by one. Arguments left out take their
// defaults.
std::vector<at::Tensor> call_op(const std::string& name, std::vector<c10::IValue> args);

}  // namespace torchlift::testing

#endif  // TORCHLIFT_BATCHING_TESTING_CALL_OP_H_
