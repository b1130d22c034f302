#include "compile/assumptions.h"

#include <ATen/core/ivalue.h>

#include <algorithm>
#include <memory>
#include <string_view>
#include <utility>
#include <variant>

#include "core/error.h"

namespace torchlift::compile {
namespace {

// Arguments of torchlift::assume.
constexpr size_t kExpected = 1, kMessage = 2, kNumber = 3;

const c10::IValue& constant(const Node& node, size_t i) {
  return std::get<c10::IValue>(node.args.at(i));
}

template <class F>
void for_each_assumption(const Graph& graph, const F& f) {
  for (const Node& node : graph.nodes) {
    if (node.op == kAssumeOp) f(node);
    for (const auto& subgraph : node.subgraphs) for_each_assumption(*subgraph, f);
  }
}

std::string without_tag(const std::string& message) {
  constexpr std::string_view kTag = "[trace] ";
  return message.rfind(kTag, 0) == 0 ? message.substr(kTag.size()) : message;
}

}  // namespace

bool assumes(const Node& node) {
  return node.op == kAssumeOp ||
         std::any_of(node.subgraphs.begin(), node.subgraphs.end(),
                     [](const auto& subgraph) { return assumes(*subgraph); });
}

bool assumes(const Graph& graph) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(),
                     [](const Node& node) { return assumes(node); });
}

const Node* find_assumption(const Graph& graph, int64_t number) {
  const Node* found = nullptr;
  for_each_assumption(graph, [&](const Node& node) {
    const auto* own = std::get_if<c10::IValue>(&node.args.at(kNumber));
    if (own != nullptr && own->isInt() && own->toInt() == number) found = &node;
  });
  return found;
}

const Node* find_assumption_of_shape(const Graph& graph) {
  const Node* found = nullptr;
  for_each_assumption(graph, [&](const Node& node) {
    const bool of_shape = constant(node, kMessage).toStringRef().find("{was}") != std::string::npos;
    if (of_shape && found == nullptr) found = &node;
  });
  return found;
}

std::string asker_of(const Node& assumption) {
  const std::string text = without_tag(constant(assumption, kMessage).toStringRef());
  return text.substr(0, text.find(": "));
}

Answers answers_of(const Graph& graph) {
  int64_t count = 0;
  for_each_assumption(graph, [&](const Node&) { ++count; });
  Answers answers;
  for_each_assumption(graph, [&](const Node& node) {
    const int64_t number = constant(node, kNumber).toInt();
    if (number < 0 || number >= count) {
      transform_error("compile", "an assumption has the number ", number, ", of ", count, ".");
    }
    answers.resize(std::max(answers.size(), static_cast<size_t>(number) + 1));
    answers[static_cast<size_t>(number)] = constant(node, kExpected).toIntVector();
  });
  return answers;
}

void KnownAnswers::note(const Answers& answers, const AssumptionError& error) {
  const size_t number = std::min(static_cast<size_t>(error.number()), answers.size());
  first_.assign(answers.begin(), answers.begin() + static_cast<int64_t>(number));
  first_.push_back(error.found());
  reason_ = reason_of(error);
}

bool KnownAnswers::agree(const Answers& answers) const {
  return answers.size() >= first_.size() &&
         std::equal(first_.begin(), first_.end(), answers.begin());
}

std::string reason_of(const AssumptionError& error) {
  const std::string text = without_tag(error.what_without_backtrace());
  return text.substr(0, text.find(". "));
}

}  // namespace torchlift::compile
