#include "core/open_transforms.h"

#include <cstddef>
#include <string>
#include <vector>

#include "core/level.h"

namespace torchlift {
namespace {

struct Mark {
  const char* mode;
  size_t levels;  // how many were open around it
};

std::vector<Mark>& marks() {
  static thread_local std::vector<Mark> open;
  return open;
}

}  // namespace

void note_transform_opened(const char* mode) { marks().push_back({mode, level_stack().size()}); }

void note_transform_closed() { marks().pop_back(); }

std::string describe_open_transforms() {
  std::string text;
  const auto add = [&](const std::string& one) {
    if (!text.empty()) text += " inside ";
    text += one;
  };
  const std::vector<LevelPtr>& levels = level_stack();
  size_t left = levels.size();
  for (auto mark = marks().rbegin(); mark != marks().rend(); ++mark) {
    while (left > mark->levels) add(levels[--left]->describe());
    add(mark->mode);
  }
  while (left > 0) add(levels[--left]->describe());
  return text;
}

}  // namespace torchlift
