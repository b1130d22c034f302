#ifndef TORCHLIFT_COMPILE_ARTIFACT_SAMPLE_ARTIFACTS_H_
#define TORCHLIFT_COMPILE_ARTIFACT_SAMPLE_ARTIFACTS_H_

// File: compile/artifact/sample_artifacts.h
//
// Artifacts for tests, which have between them everything that one can have.
//
//   for (const Artifact& artifact : sample_artifacts()) { ... }

#include <string>
#include <vector>

#include "compile/artifact/artifact.h"

namespace torchlift::compile {

// loss(params: {w, b}, x) of sizes [3], [], [3]: ((x . w + b) ^ 2, None).
Artifact loss_artifact();
// rows(x) of [n, 3]: the mean over rows, by sizes that depend on n.
Artifact dynamic_artifact();
// Constants of all dtypes, NaN and -0.0, tied, transposed, empty, expanded.
Artifact constants_artifact();
// Arguments of all kinds, also lists, strings, enums.
Artifact arguments_artifact();
// cond and scan; a subgraph that two nodes share, with a constant that the graph around has too.
Artifact control_flow_artifact();

std::vector<Artifact> sample_artifacts();

// "" if the graphs are the same in everything, constants bit for bit; else what differs.
std::string difference(const Graph& a, const Graph& b);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_SAMPLE_ARTIFACTS_H_
