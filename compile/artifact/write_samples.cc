// Writes testdata/*_v1.tlc: write_samples FOLDER. To be run again only if the format has a new
// version.

#include <string>

#include "compile/artifact/sample_artifacts.h"

int main(int count, char** words) {
  const std::string folder = count == 2 ? words[1] : ".";
  for (const auto& artifact : torchlift::compile::sample_artifacts()) {
    torchlift::compile::save_artifact(artifact, folder + "/" + artifact.name + "_v1.tlc");
  }
}
