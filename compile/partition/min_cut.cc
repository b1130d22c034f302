#include "compile/partition/min_cut.h"

#include <boost/graph/adjacency_list.hpp>
#include <boost/graph/push_relabel_max_flow.hpp>

namespace torchlift::compile {
namespace {

using Traits = boost::adjacency_list_traits<boost::vecS, boost::vecS, boost::directedS>;
using Reverse = boost::property<boost::edge_reverse_t, Traits::edge_descriptor>;
using Residual = boost::property<boost::edge_residual_capacity_t, int64_t, Reverse>;
using Capacity = boost::property<boost::edge_capacity_t, int64_t, Residual>;
using Network =
    boost::adjacency_list<boost::vecS, boost::vecS, boost::directedS, boost::no_property, Capacity>;

Network network_of(int32_t vertices, const std::vector<FlowEdge>& edges) {
  Network network(static_cast<size_t>(vertices));
  auto capacity = boost::get(boost::edge_capacity, network);
  auto reverse = boost::get(boost::edge_reverse, network);
  for (const FlowEdge& edge : edges) {
    const auto from = static_cast<size_t>(edge.from), to = static_cast<size_t>(edge.to);
    const auto forth = boost::add_edge(from, to, network).first;
    const auto back = boost::add_edge(to, from, network).first;
    capacity[forth] = edge.capacity;
    capacity[back] = 0;
    reverse[forth] = back;
    reverse[back] = forth;
  }
  return network;
}

}  // namespace

std::vector<bool> sink_side_of_min_cut(int32_t vertices, const std::vector<FlowEdge>& edges,
                                       int32_t source, int32_t sink) {
  Network network = network_of(vertices, edges);
  boost::push_relabel_max_flow(network, static_cast<size_t>(source), static_cast<size_t>(sink));
  // What still could send something to the sink. Edges are walked backwards: an edge out of a
  // vertex is the reverse of one into it.
  const auto residual = boost::get(boost::edge_residual_capacity, network);
  const auto reverse = boost::get(boost::edge_reverse, network);
  std::vector<bool> side(static_cast<size_t>(vertices), false);
  std::vector<size_t> stack = {static_cast<size_t>(sink)};
  side[static_cast<size_t>(sink)] = true;
  while (!stack.empty()) {
    const size_t vertex = stack.back();
    stack.pop_back();
    for (auto [edge, end] = boost::out_edges(vertex, network); edge != end; ++edge) {
      const size_t before = boost::target(*edge, network);
      if (side[before] || residual[reverse[*edge]] == 0) continue;
      side[before] = true;
      stack.push_back(before);
    }
  }
  return side;
}

}  // namespace torchlift::compile
