#include "compile/artifact/runner.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "compile/artifact/artifact.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/npy.h"
#include "compile/artifact/safetensors.h"
#include "compile/artifact/sample_artifacts.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Words = std::vector<std::string>;

constexpr const char* kBinary = "compile/artifact/torchlift-run";

struct Done {
  int status;
  std::string out;
  std::string err;
};

Done command(const Words& words) {
  std::ostringstream out;
  std::ostringstream err;
  const int status = run_command(words, out, err);
  return {status, out.str(), err.str()};
}

class RunnerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directories(folder_);
    save_artifact(loss_artifact(), loss_);
    save_artifact(dynamic_artifact(), rows_);
  }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  std::string npy(const std::string& name, const at::Tensor& tensor) const {
    save_npy(tensor, path(name));
    return path(name);
  }

  const std::string folder_ = ::testing::TempDir() + "runner";
  const std::string loss_ = folder_ + "/loss.tlc";
  const std::string rows_ = folder_ + "/rows.tlc";
  const at::Tensor w_ = at::tensor({1.0F, 2.0F, 3.0F});
  const at::Tensor b_ = at::tensor({0.5F}).squeeze();
  const at::Tensor x_ = at::tensor({1.0F, 0.0F, 2.0F});  // loss: (7 + 0.5)^2 = 56.25
};

TEST_F(RunnerTest, ExportedProgramsAreReadToo) {
  const std::string file = "compile/import/testdata/attention.pt2";
  const Done inspected = command({"inspect", file});
  EXPECT_EQ(inspected.status, 0) << inspected.err;
  EXPECT_THAT(inspected.out, HasSubstr("attention, written by torch.export"));
  EXPECT_THAT(inspected.out, HasSubstr("(x: f64[2, 5, 4],) -> add_1: f64[2, 5, 4]"));
  std::map<std::string, at::Tensor> recorded;
  for (const auto& [name, t] : load_safetensors("compile/import/testdata/attention.safetensors")) {
    recorded[name] = t;
  }
  const std::string output = path("attention_out.safetensors");
  const Done ran =
      command({"run", file, "--inputs", npy("x.npy", recorded.at("input.0")), "--output", output});
  EXPECT_EQ(ran.status, 0) << ran.err;
  EXPECT_TRUE(at::allclose(load_safetensors(output)[0].second, recorded.at("output.0")));
  const Done refused = command({"validate", "compile/import/testdata/conv.pt2"});
  EXPECT_EQ(refused.status, 1);
  EXPECT_THAT(refused.err, HasSubstr("which a graph cannot say"));
}

TEST_F(RunnerTest, Inspects) {
  const Done done = command({"inspect", loss_});
  EXPECT_EQ(done.status, 0);
  EXPECT_THAT(done.out, HasSubstr("loss.tlc: loss, written by torchlift"));
  EXPECT_THAT(done.out, HasSubstr("signature:  (params: {w: f32[3], b: f32[]}, x: f32[3]) -> "
                                  "(loss: f32[], state: None)"));
  EXPECT_THAT(done.out, HasSubstr("operators:  3 (1 aten::add.Tensor, 1 aten::dot"));
  EXPECT_THAT(done.out, HasSubstr("dot = aten.dot(x, params_w)"));
  EXPECT_THAT(command({"inspect", rows_}).out,
              HasSubstr("dynamic:    n, dim 0 of x, at least 1\n"));
}

TEST_F(RunnerTest, WhatItPrintsMovesNoCursor) {
  Artifact artifact = loss_artifact();
  artifact.metadata["note"] = "\x1b[2Jgone";
  save_artifact(artifact, path("escape.tlc"));
  EXPECT_THAT(command({"inspect", path("escape.tlc")}).out, HasSubstr("note = ?[2Jgone"));
}

TEST_F(RunnerTest, Validates) {
  EXPECT_THAT(command({"validate", loss_}).out, HasSubstr("valid (3 operators, 0 constants)"));
  std::filesystem::resize_file(loss_, 100);
  const Done done = command({"validate", loss_});
  EXPECT_EQ(done.status, 1);
  EXPECT_THAT(done.err, HasSubstr("loss.tlc: the file has 100 bytes, and should have"));
}

TEST_F(RunnerTest, RunsOnNpyFiles) {
  const Done done = command({"run", loss_, "--inputs", npy("w.npy", w_), npy("b.npy", b_),
                             npy("x.npy", x_), "--output", path("outputs")});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_EQ(done.out, path("outputs/loss.npy") + "\n");
  EXPECT_EQ(load_npy(path("outputs/loss.npy")).item<float>(), 56.25);
}

TEST_F(RunnerTest, RunsOnASafetensorsFile) {
  save_safetensors({{"x", x_}, {"params.b", b_}, {"params.w", w_}}, path("in.safetensors"));
  const Done done = command(
      {"run", loss_, "--inputs", path("in.safetensors"), "--output", path("out.safetensors")});
  EXPECT_EQ(done.status, 0) << done.err;
  const NamedTensors outputs = load_safetensors(path("out.safetensors"));
  ASSERT_EQ(outputs.size(), 1U);
  EXPECT_EQ(outputs[0].first, "loss");
  EXPECT_EQ(outputs[0].second.item<float>(), 56.25);
}

TEST_F(RunnerTest, RunsAtAnySizeOfDynamicDims) {
  for (const int64_t n : {1, 4}) {
    const at::Tensor x = at::arange(3 * n, at::kFloat).reshape({n, 3});
    const Done done =
        command({"run", rows_, "--inputs", npy("x.npy", x), "--output", path("rows")});
    EXPECT_EQ(done.status, 0) << done.err;
    EXPECT_TRUE(load_npy(path("rows/mean.npy")).allclose(x.mean(0)));
    EXPECT_TRUE(load_npy(path("rows/last.npy")).equal(x[n - 1]));
  }
}

TEST_F(RunnerTest, InputsMayHaveOtherStrides) {
  const at::Tensor x = at::arange(6, at::kFloat).reshape({2, 3});
  // As numpy.save writes an array of Fortran order.
  std::string bytes("\x93NUMPY\x01\x00\x76\x00", 10);
  bytes += "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }";
  bytes.resize(127, ' ');
  bytes += '\n';
  const at::Tensor columns = x.t().contiguous();
  bytes.append(static_cast<const char*>(columns.const_data_ptr()), columns.nbytes());
  std::ofstream(path("f.npy"), std::ios::binary) << bytes;
  const Done done = command({"run", rows_, "--inputs", path("f.npy"), "--output", path("rows")});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_TRUE(load_npy(path("rows/mean.npy")).allclose(x.mean(0)));
}

TEST_F(RunnerTest, PrintsOutputsThatGoNowhere) {
  save_artifact(constants_artifact(), path("constants.tlc"));
  const Done done = command({"run", path("constants.tlc")});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_THAT(done.out, HasSubstr("weight: f32[3, 4]\n"));
  EXPECT_THAT(done.out, HasSubstr("expanded: f32[2, 1000]\n(2000 numbers; --output writes them)"));
}

TEST_F(RunnerTest, MachineCodeIsNotRunUnlessThatIsAllowed) {
  Artifact artifact = loss_artifact();
  artifact.native = native_code_for_here(at::ones({20}, at::kByte));
  save_artifact(artifact, path("native.tlc"));
  const Words inputs = {"--inputs", npy("w.npy", w_), npy("b.npy", b_), npy("x.npy", x_)};
  const auto with = [&](Words words, const Words& more) {
    words.insert(words.end(), inputs.begin(), inputs.end());
    words.insert(words.end(), more.begin(), more.end());
    return command(words);
  };
  EXPECT_THAT(command({"inspect", path("native.tlc")}).out,
              HasSubstr("machine code: by inductor (20 bytes), for torchlift "));
  EXPECT_THAT(command({"validate", path("native.tlc")}).out,
              HasSubstr("valid (3 operators, 0 constants, machine code that was not looked into)"));
  EXPECT_THAT(command({"inspect", path("native.tlc")}).out, Not(HasSubstr("not for this machine")));
  artifact.native->machine = "pdp11";
  save_artifact(artifact, path("pdp11.tlc"));
  EXPECT_THAT(command({"inspect", path("pdp11.tlc")}).out,
              HasSubstr("not for this machine: its machine code is for pdp11, and"));
  const Words run = {"run", path("native.tlc")};
  EXPECT_EQ(with(run, {}).status, 1);
  EXPECT_THAT(with(run, {}).err, HasSubstr("native.tlc: it holds machine code, made by inductor"));
  EXPECT_THAT(with({"bench", path("native.tlc")}, {}).err, HasSubstr("it holds machine code"));
  EXPECT_THAT(with(run, {"--allow-native-code"}).err, HasSubstr("cannot be loaded"));
  EXPECT_THAT(with(run, {"--backend", "eager"}).out, HasSubstr("56.25"));
  EXPECT_THAT(with(run, {"--backend", "ts"}).err, HasSubstr("there is no backend 'ts'"));
}

TEST_F(RunnerTest, FilesOfOutputsStayInTheirFolder) {
  Artifact artifact = loss_artifact();
  artifact.signature.outputs = tensor("../../loss");
  save_artifact(artifact, path("escape.tlc"));
  const Done done = command({"run", path("escape.tlc"), "--inputs", npy("w.npy", w_),
                             npy("b.npy", b_), npy("x.npy", x_), "--output", path("inside")});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_TRUE(std::filesystem::exists(path("inside/_.._.._loss.npy")));
}

TEST_F(RunnerTest, Benches) {
  const Done done = command({"bench", rows_, "--repeat", "7", "--threads", "1", "--dim", "n=5"});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_THAT(done.out, ::testing::MatchesRegex(
                            "median [0-9.]+ us, fastest [0-9.]+ us, slowest [0-9.]+ us; 7 runs on "
                            "1 thread\n"));
  EXPECT_THAT(command({"bench", rows_, "--dim", "m=5"}).err,
              HasSubstr("the artifact has no dynamic dim 'm'; it has n."));
}

TEST_F(RunnerTest, InputsThatDoNotFitAreExplained) {
  const std::string w = npy("w.npy", w_);
  EXPECT_THAT(command({"run", loss_, "--inputs", w}).err,
              HasSubstr("takes 3 tensors (params.w, params.b, x), and got 1 files"));
  EXPECT_THAT(command({"run", loss_, "--inputs", w, w, loss_}).err,
              HasSubstr("loss.tlc is no .npy file"));
  EXPECT_THAT(command({"run", loss_, "--inputs", w, w, path("gone.npy")}).err,
              HasSubstr("gone.npy: the file cannot be opened"));
  const Done done = command({"run", loss_, "--inputs", w, w, npy("long.npy", at::zeros({7}))});
  EXPECT_EQ(done.status, 1);
  EXPECT_THAT(done.err, HasSubstr("params_b"));
  save_safetensors({{"x", x_}, {"params.b", b_}}, path("in.safetensors"));
  EXPECT_THAT(command({"run", loss_, "--inputs", path("in.safetensors")}).err,
              HasSubstr("in.safetensors has no tensor 'params.w'; the artifact takes params.w, "));
  save_safetensors({{"x", x_}, {"y", b_}}, path("in.safetensors"));
  EXPECT_THAT(command({"run", rows_, "--inputs", path("in.safetensors")}).err,
              HasSubstr("has a tensor 'y', which the artifact does not take"));
}

TEST_F(RunnerTest, CommandLinesThatAreWrongAreExplained) {
  const auto usage_error = [](const Words& words) {
    const Done done = command(words);
    EXPECT_EQ(done.status, 2);
    EXPECT_THAT(done.err, HasSubstr("See torchlift-run --help."));
    return done.err;
  };
  EXPECT_THAT(usage_error({}), HasSubstr("a command is missing"));
  EXPECT_THAT(usage_error({"runn"}), HasSubstr("there is no command 'runn'; there are inspect"));
  EXPECT_THAT(usage_error({"run"}), HasSubstr("run needs a file"));
  EXPECT_THAT(usage_error({"run", "a", "b"}), HasSubstr("takes one file, and got 'a' and 'b'"));
  EXPECT_THAT(usage_error({"run", "a", "--repeat", "3"}), HasSubstr("run has no option --repeat"));
  EXPECT_THAT(usage_error({"run", "a", "--inputs"}), HasSubstr("--inputs needs files"));
  EXPECT_THAT(usage_error({"bench", "a", "--repeat", "0"}), HasSubstr("--repeat must be a whole"));
  EXPECT_THAT(usage_error({"bench", "a", "--dim", "n"}), HasSubstr("--dim must be NAME=SIZE"));
  EXPECT_THAT(command({"--help"}).out, HasSubstr("torchlift-run inspect FILE"));
  EXPECT_THAT(command({"--version"}).out, HasSubstr("for torch"));
}

// --- the binary ----------------------------------------------------------------------------------

TEST_F(RunnerTest, TheBinaryGivesTheExitCodes) {
  const auto status = [&](const std::string& words) {
    const std::string line = std::string(kBinary) + " " + words + " > /dev/null 2>&1";
    return WEXITSTATUS(std::system(line.c_str()));
  };
  EXPECT_EQ(status("validate " + loss_), 0);
  EXPECT_EQ(status("inspect " + rows_), 0);
  EXPECT_EQ(status("bench " + rows_ + " --repeat 3"), 0);
  EXPECT_EQ(status("validate " + path("gone.tlc")), 1);
  EXPECT_EQ(status("frobnicate " + loss_), 2);
}

std::string maps_of(pid_t process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/maps");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST_F(RunnerTest, NoPythonIsLoaded) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    execl(kBinary, kBinary, "bench", rows_.c_str(), "--repeat", "100000000", nullptr);
    _exit(127);
  }
  // Until libtorch is there, and some runs more.
  std::string maps;
  for (int i = 0; i < 600 && maps.find("libtorch_cpu") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    maps = maps_of(child);
  }
  std::this_thread::sleep_for(std::chrono::seconds(2));
  maps = maps_of(child);
  EXPECT_EQ(waitpid(child, nullptr, WNOHANG), 0) << "it ended too soon";
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ends[0]);
  close(ends[1]);
  EXPECT_THAT(maps, HasSubstr("libtorch_cpu"));
  EXPECT_THAT(maps, Not(HasSubstr("libpython")));
  EXPECT_THAT(maps, Not(HasSubstr("libtorch_python")));
  EXPECT_THAT(maps, Not(HasSubstr("libtorch_cuda")));
}

}  // namespace
}  // namespace torchlift::compile
