// Files that chance has changed. Those whose checksums do not fit must be refused; those whose
// checksums were made to fit must be refused too, or be well formed.

#include <ATen/ops/arange.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "compile/artifact/artifact.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/safetensors.h"
#include "compile/artifact/sample_artifacts.h"
#include "compile/artifact/tampering.h"
#include "core/error.h"

// The largest piece of memory that this program asked for since it was set to 0.
static std::atomic<size_t> largest{0};

void* operator new(size_t size) {
  for (size_t seen = largest; size > seen && !largest.compare_exchange_weak(seen, size);) {
  }
  void* memory = std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace torchlift::compile {
namespace {

// Whether `bytes` was refused, with an error of ours. Anything else that is thrown fails the test.
bool is_refused(const std::string& bytes, Artifact* loaded = nullptr) {
  try {
    Artifact artifact = parse_artifact(bytes);
    if (loaded != nullptr) *loaded = std::move(artifact);
    return false;
  } catch (const TransformError& error) {
    EXPECT_EQ(std::string(error.what_without_backtrace()).substr(0, 17), "[load] artifact: ");
  } catch (const UnsupportedError&) {
    // An operator of another name.
  }
  return true;
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  std::string operator()(std::string bytes) {
    if (bytes.empty()) return bytes;
    const size_t changes = 1 + below(4);
    for (size_t i = 0; i < changes; ++i) change(bytes);
    return bytes;
  }
  size_t below(size_t limit) {
    return std::uniform_int_distribution<size_t>(0, limit - 1)(random_);
  }

 private:
  void change(std::string& bytes) {
    switch (below(5)) {
      case 0:
        bytes[below(bytes.size())] ^= static_cast<char>(1 << below(8));
        return;
      case 1:
        bytes[below(bytes.size())] = static_cast<char>(below(256));
        return;
      case 2:
        put_word(bytes, kWords[below(std::size(kWords))]);
        return;
      case 3:  // What an offset or a number says, elsewhere.
        if (bytes.size() >= 8) {
          uint32_t word = 0;
          std::memcpy(&word, bytes.data() + 4 * below(bytes.size() / 4), 4);
          put_word(bytes, word);
        }
        return;
      default: {  // Small steps lead to other fields of the same table.
        const size_t at = below(bytes.size());
        bytes[at] = static_cast<char>(bytes[at] + static_cast<int>(below(9)) - 4);
      }
    }
  }

  void put_word(std::string& bytes, uint32_t word) {
    if (bytes.size() < 4) return;
    std::memcpy(bytes.data() + 4 * below(bytes.size() / 4), &word, 4);
  }

  static constexpr uint32_t kWords[] = {0,          1,      2,          0xFFFFFFFF, 0x7FFFFFFF,
                                        0x80000000, 0xFFFF, 0x10000,    0xFFFFFFFC, 1000,
                                        0x40000000, 0xFF,   0x3F800000, 0x7FC00000, 16};
  std::mt19937_64 random_;
};

// The samples, and one with machine code.
std::vector<Artifact> fuzzed_artifacts() {
  std::vector<Artifact> artifacts = sample_artifacts();
  artifacts.push_back(loss_artifact());
  artifacts.back().native = native_code_for_here(at::arange(50, at::kByte));
  return artifacts;
}

class FuzzTest : public ::testing::TestWithParam<size_t> {
 protected:
  const std::string bytes_ = artifact_bytes(fuzzed_artifacts()[GetParam()]);
};

TEST_P(FuzzTest, EveryTruncationIsRefused) {
  for (size_t length = 0; length < bytes_.size(); ++length) {
    ASSERT_TRUE(is_refused(bytes_.substr(0, length))) << length;
  }
}

TEST_P(FuzzTest, EveryByteThatChangesIsNoticed) {
  Mutator mutator(GetParam());
  for (size_t i = 0; i < bytes_.size(); ++i) {
    std::string changed = bytes_;
    changed[i] ^= static_cast<char>(1 << mutator.below(8));
    ASSERT_TRUE(is_refused(changed)) << i;
  }
}

TEST_P(FuzzTest, WhatHasRightChecksumsIsRefusedOrWellFormed) {
  const Sections sections = split(bytes_);
  Mutator mutator(100 + GetParam());
  int refused = 0;
  constexpr int kRounds = 4000;
  for (int i = 0; i < kRounds; ++i) {
    const std::string changed = join({mutator(sections.graph), sections.weights});
    Artifact loaded;
    largest = 0;
    if (is_refused(changed, &loaded)) {
      ++refused;
      ASSERT_LT(largest, 64 * changed.size() + (1 << 16));
      continue;
    }
    ASSERT_LT(largest, 64 * changed.size() + (1 << 16));
    verify(loaded.graph);
    const Artifact again = parse_artifact(artifact_bytes(loaded));
    ASSERT_EQ(difference(again.graph, loaded.graph), "") << "round " << i;
    ASSERT_EQ(again.signature, loaded.signature);
  }
  // Else this test looks at nothing.
  EXPECT_GT(refused, kRounds / 20);
  EXPECT_LT(refused, kRounds);
}

TEST_P(FuzzTest, WeightsThatChangeAreRefused) {
  const Sections sections = split(bytes_);
  Mutator mutator(200 + GetParam());
  for (int i = 0; i < 1000; ++i) {
    Sections changed{sections.graph, mutator(sections.weights)};
    if (changed.weights == sections.weights) continue;
    // Of the header, what nobody needs to read the numbers may differ.
    is_refused(join(changed));
  }
}

TEST_P(FuzzTest, GraphsOfAnyBytesAreRefused) {
  const Sections sections = split(bytes_);
  Mutator mutator(300 + GetParam());
  for (int i = 0; i < 300; ++i) {
    std::string noise(8 + mutator.below(500), '\0');
    for (char& c : noise) c = static_cast<char>(mutator.below(256));
    if (i % 2 == 0) noise.replace(4, 4, "TLCG");
    ASSERT_TRUE(is_refused(join({noise, sections.weights})));
  }
}

INSTANTIATE_TEST_SUITE_P(Samples, FuzzTest, ::testing::Range<size_t>(0, 6));

TEST(FuzzSafetensorsTest, ChangedFilesAreReadOrRefused) {
  const std::string path = ::testing::TempDir() + "fuzzed.safetensors";
  const Artifact artifact = constants_artifact();
  NamedTensors tensors;
  for (size_t i = 0; i < 4; ++i) {
    tensors.emplace_back("t" + std::to_string(i), artifact.graph.constants[i].tensor);
  }
  save_safetensors(tensors, path, {{"k", "v"}});
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  Mutator mutator(7);
  for (int i = 0; i < 1000; ++i) {
    std::string changed = i < 200 ? bytes.substr(0, mutator.below(bytes.size())) : mutator(bytes);
    std::ofstream(path, std::ios::binary) << changed;
    largest = 0;
    try {
      load_safetensors(path);
    } catch (const TransformError&) {
      // As it should.
    }
    ASSERT_LT(largest, 64 * bytes.size() + (1 << 16));
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace torchlift::compile
