#include <iostream>

#include "compile/artifact/runner.h"

int main(int count, char** words) {
  return torchlift::compile::run_command({words + 1, words + count}, std::cout, std::cerr);
}
