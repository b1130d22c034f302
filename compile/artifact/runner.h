#ifndef TORCHLIFT_COMPILE_ARTIFACT_RUNNER_H_
#define TORCHLIFT_COMPILE_ARTIFACT_RUNNER_H_

// File: compile/artifact/runner.h
//
// The program torchlift-run, as a function (docs/artifacts.md, "torchlift-run").
//
//   const int status = run_command({"inspect", "loss.tlc"}, std::cout, std::cerr);
//
// Exit codes: 0, done; 1, it could not be done (the file is bad, an input does not fit); 2, the
// command line is wrong.

#include <iosfwd>
#include <string>
#include <vector>

namespace torchlift::compile {

int run_command(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_RUNNER_H_
