#include "compile/artifact/npy.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <string>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

std::string path_of(const std::string& name) { return ::testing::TempDir() + name; }

// As numpy.save writes it, with 16 bits of length.
std::string file_bytes(std::string header, const std::string& numbers, char version = 1) {
  header += '\n';
  std::string bytes = "\x93NUMPY";
  bytes += version;
  bytes += '\0';
  bytes += static_cast<char>(header.size());
  bytes += '\0';
  if (version > 1) bytes += std::string(2, '\0');
  return bytes + header + numbers;
}

at::Tensor load_bytes(const std::string& bytes) {
  const std::string path = path_of("written.npy");
  std::ofstream(path, std::ios::binary) << bytes;
  return load_npy(path);
}

std::string error_of(const std::string& bytes) {
  try {
    load_bytes(bytes);
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

class NpyDtypeTest : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(NpyDtypeTest, RoundTrip) {
  const std::string path = path_of("round.npy");
  const at::Tensor numbers = at::arange(6).remainder(2).reshape({2, 3}).to(GetParam());
  for (const at::Tensor& tensor :
       {numbers, numbers.t(), numbers[0], numbers[0][1], at::empty({0, 3}, numbers.options())}) {
    save_npy(tensor, path);
    const at::Tensor loaded = load_npy(path);
    EXPECT_EQ(loaded.dtype(), tensor.dtype());
    EXPECT_TRUE(loaded.equal(tensor));
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, NpyDtypeTest,
                         ::testing::Values(at::kFloat, at::kDouble, at::kHalf, at::kLong, at::kInt,
                                           at::kShort, at::kChar, at::kByte, at::kBool,
                                           at::kComplexFloat, at::kComplexDouble,
                                           at::ScalarType::UInt16, at::ScalarType::UInt32,
                                           at::ScalarType::UInt64));

TEST(NpyTest, ReadsBothOrdersAndAllVersions) {
  const std::string numbers("\x01\x02\x03\x04\x05\x06", 6);
  const std::string c = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }";
  const std::string f = "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3), }";
  for (const char version : {'\1', '\2', '\3'}) {
    EXPECT_TRUE(load_bytes(file_bytes(c, numbers, version))
                    .equal(at::tensor({1, 2, 3, 4, 5, 6}, at::kByte).reshape({2, 3})));
    EXPECT_TRUE(load_bytes(file_bytes(f, numbers, version))
                    .equal(at::tensor({1, 3, 5, 2, 4, 6}, at::kByte).reshape({2, 3})));
  }
}

TEST(NpyTest, WritesWhatNumpyWrites) {
  const std::string path = path_of("numpy.npy");
  save_npy(at::tensor({1.0F, 2.0F}), path);
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  ASSERT_EQ(bytes.size(), 128U + 8U);
  EXPECT_EQ(bytes.substr(0, 10), std::string("\x93NUMPY\x01\x00\x76\x00", 10));
  EXPECT_EQ(bytes.substr(10, 59), "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }  ");
}

TEST(NpyTest, RefusesWhatIsNoTensor) {
  const auto of = [](const std::string& descr) {
    return error_of(file_bytes("{'descr': " + descr + ", 'fortran_order': False, 'shape': (1,), }",
                               "12345678"));
  };
  EXPECT_THAT(of("'>f8'"), HasSubstr("its numbers are big endian ('>f8')"));
  EXPECT_THAT(of("'|O'"), HasSubstr("it holds Python objects"));
  EXPECT_THAT(of("'<U2'"), HasSubstr("its dtype is '<U2', which torch has not"));
  EXPECT_THAT(of("'|V2'"), HasSubstr("NumPy has no bfloat16 and no float8: use .safetensors"));
  EXPECT_THAT(of("[('a', '<f4')]"), HasSubstr("records of several fields"));
}

TEST(NpyTest, RefusesFilesThatAreDamaged) {
  const auto of = [](const std::string& shape, const std::string& numbers) {
    return error_of(
        file_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + "}", numbers));
  };
  EXPECT_THAT(of("(2,)", "1234"), HasSubstr("its shape needs 8 bytes, and 4 follow the header"));
  EXPECT_THAT(of("(1,)", "12345"), HasSubstr("needs 4 bytes, and 5 follow"));
  EXPECT_THAT(of("(-1,)", "1234"), HasSubstr("cannot be negative"));
  EXPECT_THAT(of("(4611686018427387904, 4)", "1234"), HasSubstr("more than 2^63 - 1 bytes"));
  EXPECT_THAT(of("(99999999999999999999,)", "1234"), HasSubstr("not of the form"));
  EXPECT_THAT(of("(1,", "1234"), HasSubstr("not of the form"));
  EXPECT_THAT(error_of("PK\3\4 and so on"), HasSubstr("this is no .npy file"));
  EXPECT_THAT(error_of(std::string("\x93NUMPY\x07\x00\x10\x00xxxx", 14)), HasSubstr("version 7"));
  EXPECT_THAT(error_of(std::string("\x93NUMPY\x01\x00\xff\x00xxxx", 14)),
              HasSubstr("255 bytes from byte 10 on are needed, and there are 14"));
}

TEST(NpyTest, NumpyHasNoBfloat16) {
  try {
    save_npy(at::ones({2}, at::kBFloat16), path_of("b.npy"));
    FAIL();
  } catch (const TransformError& error) {
    EXPECT_THAT(error.what_without_backtrace(), HasSubstr("NumPy has no bfloat16. Write a .safe"));
  }
}

TEST(NpyTest, ChangedFilesAreReadOrRefused) {
  std::mt19937 random(3);
  const std::string bytes =
      file_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", std::string(24, 1));
  for (int i = 0; i < 500; ++i) {
    std::string changed = bytes;
    if (i < 100) changed.resize(random() % bytes.size());
    for (int k = 0; k < 3; ++k) {
      if (!changed.empty()) changed[random() % changed.size()] = static_cast<char>(random());
    }
    error_of(changed);
  }
}

}  // namespace
}  // namespace torchlift::compile
