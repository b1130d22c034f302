#ifndef TORCHLIFT_BATCHING_TESTING_RANDOM_OPS_H_
#define TORCHLIFT_BATCHING_TESTING_RANDOM_OPS_H_

// File: batching/testing/random_ops.h
//
// The random operators that run on CPU, as functions of one tensor of 40 numbers (0.5 each), for
// tests that go through all of them.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace torchlift::testing {

struct RandomOp {
  std::string name;  // "aten::normal.Tensor_float"
  // Calls it on x, or leaves x alone where the operator takes no tensor.
  std::function<at::Tensor(const at::Tensor& x)> f;
  bool takes_tensor = true;
  bool in_place = false;  // draws into x
  // Draws into a tensor that it makes itself, like x: one that all examples share where they share
  // x.
  bool fills = false;
  // With randomness="same", whether it can share one draw among examples that differ.
  bool shares = true;
  bool numbers = true;  // all it draws has one distribution (no permutation, say)
  bool exact = true;    // what it computes from the numbers does not depend on the batch
};

const std::vector<RandomOp>& random_ops();

// Random operators of libtorch that are not in the table, each with the reason.
const std::vector<std::pair<std::string, std::string>>& random_ops_left_out();

}  // namespace torchlift::testing

#endif  // TORCHLIFT_BATCHING_TESTING_RANDOM_OPS_H_
