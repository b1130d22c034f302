// The tool behind torchlift_library: make_library ARTIFACT NAMESPACE INCLUDE_PATH HEADER SOURCE

#include <c10/util/Exception.h>

#include <exception>
#include <filesystem>
#include <iostream>
#include <string>

#include "compile/artifact/bytes.h"
#include "compile/artifact/library_source.h"

namespace {

namespace compile = torchlift::compile;

void make_library(char** words) {
  const compile::FileBytes file(words[1]);
  const std::string bytes = file.read_string(0, file.size());
  const compile::LibrarySource made =
      compile::library_source(bytes, {.file = std::filesystem::path(words[1]).filename().string(),
                                      .header_path = words[3],
                                      .cpp_namespace = words[2]});
  for (const auto& [path, text] : {std::pair{words[4], made.header}, {words[5], made.source}}) {
    compile::FileWriter out(path);
    out.write(text);
    out.finish();
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::cerr << "usage: make_library ARTIFACT NAMESPACE INCLUDE_PATH HEADER SOURCE\n";
    return 2;
  }
  try {
    make_library(words);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << words[1] << ": " << error.what() << "\n";
  }
  return 1;
}
