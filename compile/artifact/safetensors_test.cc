#include "compile/artifact/safetensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

std::string path_of(const std::string& name) { return ::testing::TempDir() + name; }

std::string write_file(const std::string& json, const std::string& numbers) {
  const uint64_t length = json.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  const std::string path = path_of("written.safetensors");
  std::ofstream(path, std::ios::binary) << bytes + json + numbers;
  return path;
}

std::string error_of(const std::string& json, const std::string& numbers = "") {
  try {
    load_safetensors(write_file(json, numbers));
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(SafetensorsTest, RoundTrip) {
  const at::Tensor matrix = at::arange(6, at::kFloat).reshape({2, 3});
  const NamedTensors tensors = {{"a", matrix},
                                {"transposed", matrix.t()},
                                {"half", matrix.to(at::kBFloat16)},
                                {"flag", at::ones({}, at::kBool)},
                                {"z", matrix.to(at::kComplexFloat)},
                                {"none", at::empty({0, 4})}};
  const std::string path = path_of("round.safetensors");
  save_safetensors(tensors, path, {{"format", "pt"}});
  const NamedTensors loaded = load_safetensors(path);
  ASSERT_EQ(loaded.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const auto found = std::find_if(loaded.begin(), loaded.end(),
                                    [&](const auto& each) { return each.first == name; });
    ASSERT_NE(found, loaded.end()) << name;
    EXPECT_EQ(found->second.dtype(), tensor.dtype());
    EXPECT_TRUE(found->second.equal(tensor)) << name;
  }
}

// As the safetensors library of Python (0.5) writes {"x": [1.0, 2.0]}.
TEST(SafetensorsTest, ReadsWhatOthersWrite) {
  std::string numbers(8, '\0');
  const float values[2] = {1, 2};
  std::memcpy(numbers.data(), values, 8);
  const NamedTensors loaded = load_safetensors(
      write_file(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     )", numbers));
  ASSERT_EQ(loaded.size(), 1U);
  EXPECT_EQ(loaded[0].first, "x");
  EXPECT_TRUE(loaded[0].second.equal(at::tensor({1.0F, 2.0F})));
}

TEST(SafetensorsTest, HeadersAreChecked) {
  EXPECT_THAT(error_of("{"), HasSubstr("its header is no JSON"));
  EXPECT_THAT(error_of("[1]"), HasSubstr("does not begin with '{'"));
  EXPECT_THAT(error_of(R"({"x": 3})"), HasSubstr("tensor 'x' is a number, no object"));
  EXPECT_THAT(error_of(R"({"x": {"dtype": "F32", "shape": [1]}})"),
              HasSubstr("tensor 'x' has no data_offsets, which is a pair of numbers"));
  EXPECT_THAT(error_of(R"({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})"),
              HasSubstr("shape of tensor 'x' has a number, which is no whole number from 0"));
  EXPECT_THAT(error_of(R"({"x": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}})"),
              HasSubstr("no whole number"));
  EXPECT_THAT(error_of(R"({"x": {"dtype": "Q4", "shape": [], "data_offsets": [0, 0]}})"),
              HasSubstr("tensor 'x' is of dtype Q4, which torch has not"));
  EXPECT_THAT(error_of(R"({"x": {"dtype": "F32", "shape": [[1]], "data_offsets": [0, 4]}})"),
              HasSubstr("nested deeper"));
  EXPECT_THAT(error_of(R"({"__metadata__": {"a": 1}})"), HasSubstr("is no string"));
  const std::string entry = R"({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})";
  EXPECT_THAT(error_of(R"({"x": )" + entry + R"(, "x": )" + entry + "}", "1"),
              HasSubstr("has the key \"x\" twice"));
}

TEST(SafetensorsTest, PlacesAreChecked) {
  const auto of = [](const std::string& shape, const std::string& offsets) {
    return R"({"x": {"dtype": "U8", "shape": )" + shape + R"(, "data_offsets": )" + offsets + "}}";
  };
  EXPECT_THAT(error_of(of("[4]", "[0, 4]"), "123"), HasSubstr("its tensors have 4 bytes, and 3"));
  EXPECT_THAT(error_of(of("[3]", "[1, 4]"), "1234"), HasSubstr("there must be no gap"));
  EXPECT_THAT(error_of(of("[3]", "[4, 1]"), "1234"), HasSubstr("before its begin"));
  EXPECT_THAT(error_of(of("[3]", "[0, 4]"), "1234"), HasSubstr("has 4 bytes; its shape needs 3"));
  EXPECT_THAT(error_of(of("[4294967296, 4294967296]", "[0, 0]")), HasSubstr("2^63 - 1 bytes"));
  EXPECT_THAT(error_of(of("[0, 4294967296, 4294967296]", "[0, 0]")), HasSubstr("2^63 - 1 bytes"));
  EXPECT_THAT(error_of(of("[1]", "[0, 9223372036854775808]")), HasSubstr("no whole number"));
}

TEST(SafetensorsTest, FilesThatAreNoneAreNamed) {
  const std::string path = path_of("short.safetensors");
  std::ofstream(path, std::ios::binary) << "abc";
  EXPECT_THROW(load_safetensors(path), TransformError);
  std::ofstream(path, std::ios::binary) << std::string(16, '\xff');
  try {
    load_safetensors(path);
    FAIL();
  } catch (const TransformError& error) {
    EXPECT_THAT(error.what_without_backtrace(),
                HasSubstr("[load] " + path + ": this is no safetensors, or it is cut: its header"));
  }
}

TEST(SafetensorsTest, BoolsAreZeroOrOne) {
  EXPECT_THAT(error_of(R"({"x": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}})", "\1\2"),
              HasSubstr("a bool has the byte 2"));
}

TEST(SafetensorsTest, WhatTheFormatHasNotIsRefused) {
  try {
    save_safetensors({{"z", at::ones({2}, at::kComplexDouble)}}, path_of("z.safetensors"));
    FAIL();
  } catch (const TransformError& error) {
    EXPECT_THAT(error.what_without_backtrace(),
                HasSubstr("tensor 'z' is of dtype complex128, which safetensors has not"));
  }
}

}  // namespace
}  // namespace torchlift::compile
