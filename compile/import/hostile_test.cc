// Exported programs that are cut, damaged, or made to do harm.

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "compile/import/exported_program.h"
#include "compile/import/json.h"
#include "compile/import/recorded.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr const char* kProgram = "models/model.json";
constexpr const char* kWeights = "data/weights/model_weights_config.json";

using Records = std::map<std::string, std::string>;

std::string file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Records records_of(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  Records records;
  for (const std::string& name : reader.getAllRecords()) {
    if (name.rfind(".data", 0) == 0) continue;  // the writer adds its own
    const auto [data, size] = reader.getRecord(name);
    records[name].assign(static_cast<const char*>(data.get()), size);
  }
  return records;
}

std::string temporary() { return ::testing::TempDir() + "hostile.pt2"; }

void write(const Records& records) {
  caffe2::serialize::PyTorchStreamWriter writer(temporary());
  for (const auto& [name, bytes] : records) writer.writeRecord(name, bytes.data(), bytes.size());
  writer.writeEndOfFile();
}

// What loading the file that was written says; "" where it is loaded. Any other kind of error fails
// the test that calls this.
std::string loading() {
  try {
    load_exported(temporary());
    return "";
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  } catch (const UnsupportedError& error) {
    return error.what_without_backtrace();
  }
}

std::string loading_bytes(const std::string& bytes) {
  std::ofstream(temporary(), std::ios::binary) << bytes;
  return loading();
}

std::string with_json(const std::string& model, const std::string& record,
                      const std::function<void(Json&)>& edit) {
  Records records = records_of(model_path(model));
  Json json = Json::parse(records.at(record));
  edit(json);
  records[record] = json.dump();
  write(records);
  return loading();
}

Json& node(Json& program, size_t i) { return program["graph_module"]["graph"]["nodes"][i]; }

// --- damage --------------------------------------------------------------------------------------

TEST(DamagedTest, WritingAnewChangesNothing) {
  for (const char* model : {"mlp", "conv", "structured", "flow"}) {
    write(records_of(model_path(std::string(model) + ".pt2")));
    expect_recorded(load_exported(temporary()), Recorded(model));
  }
}

TEST(DamagedTest, CutFilesAreRefused) {
  const std::string bytes = file_bytes(model_path("mlp.pt2"));
  for (size_t length = 0; length < bytes.size(); length += 13) {
    ASSERT_THAT(loading_bytes(bytes.substr(0, length)), StartsWith("[load_exported] ")) << length;
  }
}

// The archive has bytes that mean nothing: padding, dates.
TEST(DamagedTest, BytesThatChangeAreNoticedOrMeanNothing) {
  const std::string bytes = file_bytes(model_path("structured.pt2"));
  const Recorded recorded("structured");
  std::mt19937_64 random(1);
  int refused = 0;
  for (size_t i = 0; i < bytes.size(); i += 5) {
    std::string changed = bytes;
    changed[i] ^= static_cast<char>(1 << random() % 8);
    const std::string error = loading_bytes(changed);
    if (error.empty()) {
      expect_recorded(load_exported(temporary()), recorded);
    } else {
      ASSERT_THAT(error, StartsWith("[load_exported] ")) << i;
      ++refused;
    }
  }
  EXPECT_GT(refused, static_cast<int>(bytes.size() / 5 / 3));
}

TEST(DamagedTest, RecordsThatAreMissingOrCutAreNoticed) {
  const Records records = records_of(model_path("mlp.pt2"));
  for (const auto& [name, bytes] : records) {
    // Samples of inputs, and a version that is always 0.
    const bool unused = name.rfind("data/sample_inputs", 0) == 0 || name == "archive_version" ||
                        name.rfind("data/constants", 0) == 0 || name == "byteorder";
    Records less = records;
    less.erase(name);
    write(less);
    EXPECT_EQ(loading().empty(), unused) << name;
    if (unused) continue;
    less[name] = bytes.substr(0, bytes.size() / 2);
    write(less);
    EXPECT_THAT(loading(), StartsWith("[load_exported] ")) << name;
  }
}

// --- wrong contents ------------------------------------------------------------------------------

TEST(HostileTest, WhatIsWrongIsSaid) {
  const auto program = [](const std::function<void(Json&)>& edit) {
    return with_json("mlp.pt2", kProgram, edit);
  };
  EXPECT_EQ(program([](Json&) {}), "");
  EXPECT_THAT(program([](Json& p) { p = 3; }), HasSubstr("the program is a JSON number"));
  EXPECT_THAT(program([](Json& p) { p.erase("graph_module"); }), HasSubstr("no 'graph_module'"));
  EXPECT_THAT(program([](Json& p) { p["schema_version"]["major"] = 9; }),
              HasSubstr("version 9 of torch.export's schema; this torchlift reads version 8"));
  EXPECT_THAT(
      program([](Json& p) { node(p, 0)["target"] = "torch.ops.aten.no_such.default"; }),
      HasSubstr("the program calls aten::no_such, an operator that this libtorch does not"));
  EXPECT_THAT(program([](Json& p) { node(p, 0)["target"] = "torch.ops.aten.from_file.default"; }),
              HasSubstr("reads and writes files"));
  EXPECT_THAT(
      program([](Json& p) { node(p, 0)["target"] = "torch.ops.higher_order.flex_attention"; }),
      HasSubstr("the higher-order operator flex_attention"));
  EXPECT_THAT(program([](Json& p) { node(p, 0)["target"] = "os.system"; }),
              HasSubstr("the program calls 'os.system', a function of Python"));
  EXPECT_THAT(program([](Json& p) { node(p, 0)["inputs"][0]["name"] = "other"; }),
              HasSubstr("input of aten::linear is not given, and has no default"));
  EXPECT_THAT(program([](Json& p) {
                node(p, 0)["inputs"].push_back({{"name", "extra"}, {"arg", {{"as_int", 1}}}});
              }),
              HasSubstr("aten::linear is called with the argument extra"));
  EXPECT_THAT(program([](Json& p) {
                node(p, 0)["inputs"][0]["arg"] = {{"as_int", "x"}};
              }),
              HasSubstr("input of aten::linear is a JSON string"));
  EXPECT_THAT(program([](Json& p) { node(p, 0)["inputs"][0]["arg"]["as_tensor"]["name"] = "y"; }),
              HasSubstr("reads the tensor 'y', which is not defined before"));
  EXPECT_THAT(program([](Json& p) {
                node(p, 0)["outputs"].push_back({{"as_none", true}});
              }),
              HasSubstr("gives 1 results, and the program names 2"));
  EXPECT_THAT(program([](Json& p) { std::swap(node(p, 0), node(p, 2)); }),
              HasSubstr("not defined before"));
}

TEST(HostileTest, ThePlacesOfWeightsAreChecked) {
  const auto weight = [](const std::function<void(Json&)>& edit) {
    return with_json("mlp.pt2", kWeights,
                     [&](Json& config) { edit(config["config"]["first.weight"]); });
  };
  EXPECT_EQ(weight([](Json&) {}), "");
  const auto meta = [&](const char* field, const Json& value) {
    return weight([&](Json& w) { w["tensor_meta"][field] = value; });
  };
  const Json large = {{"as_int", int64_t{1} << 62}};
  EXPECT_THAT(meta("storage_offset", {{"as_int", 1}}), HasSubstr("its storage has 15"));
  EXPECT_THAT(meta("storage_offset", {{"as_int", -1}}), HasSubstr("the size or stride -1"));
  EXPECT_THAT(meta("strides", {{{"as_int", 3}}, {{"as_int", 5}}}), HasSubstr("its storage has 15"));
  EXPECT_THAT(meta("strides", {large, large}), HasSubstr("'first.weight'"));
  EXPECT_THAT(meta("sizes", {large, large}), HasSubstr("more than 2^63 - 1 bytes"));
  EXPECT_THAT(meta("sizes", Json::array()), HasSubstr("0 sizes and 2 strides"));
  EXPECT_THAT(meta("dtype", 5), HasSubstr("and the program says"));
  EXPECT_THAT(meta("dtype", 99), HasSubstr("the dtype 99"));
  EXPECT_THAT(meta("layout", 1), HasSubstr("no strided tensor"));
  EXPECT_THAT(meta("device", {{"type", "abacus"}}), HasSubstr("there is no device 'abacus'"));
  EXPECT_THAT(meta("device", {{"type", "cuda"}, {"index", 1000}}), HasSubstr("index 1000"));
  EXPECT_THAT(weight([](Json& w) { w["use_pickle"] = true; }), HasSubstr("is pickled"));
  EXPECT_THAT(weight([](Json& w) { w["path_name"] = "../../other"; }), HasSubstr("there is no"));
}

TEST(HostileTest, EnumsAreNoOtherNumbers) {
  const auto first_zeros = [](const std::function<void(Json&)>& edit) {
    return with_json("flow.pt2", kProgram, [&](Json& program) {
      for (Json& each : program["graph_module"]["graph"]["nodes"]) {
        if (each["target"] != "torch.ops.aten.zeros.default") continue;
        for (Json& input : each["inputs"]) {
          if (input["name"] == "dtype") edit(input["arg"]);
        }
      }
    });
  };
  EXPECT_EQ(first_zeros([](Json&) {}), "");
  EXPECT_THAT(first_zeros([](Json& dtype) {
                dtype = {{"as_int", 1000}};
              }),
              HasSubstr("dtype of aten::zeros is as_int, and should be a"));
  EXPECT_THAT(first_zeros([](Json& dtype) { dtype = {{"as_layout", 1}}; }), HasSubstr("as_layout"));
  EXPECT_THAT(first_zeros([](Json& dtype) {
                dtype = {{"as_scalar_type", 20}};
              }),
              HasSubstr("the dtype 20"));
}

TEST(HostileTest, DeepNestingIsRefused) {
  Records records = records_of(model_path("mlp.pt2"));
  records[kProgram] = std::string(1 << 20, '[');
  write(records);
  EXPECT_THAT(loading(), HasSubstr("nested deeper than"));
}

TEST(HostileTest, SizesOfDynamicDimsAreChecked) {
  const auto x = [](const std::string& size) {
    return with_json("structured.pt2", kProgram, [&](Json& program) {
      program["graph_module"]["graph"]["tensor_values"]["cat"]["sizes"][0]["as_expr"]["expr_str"] =
          size;
    });
  };
  EXPECT_THAT(x("Symbol('u0', integer=True)"), HasSubstr("depends on the numbers in its tensors"));
  EXPECT_THAT(x("Symbol('s99', integer=True)"), HasSubstr("s99 is the size of no dim of an input"));
  EXPECT_THAT(x("Frobenius(Integer(1), Integer(2))"), HasSubstr("computed by Frobenius"));
  EXPECT_THAT(x("__import__('os')"), HasSubstr("cannot be read"));
}

// --- chance --------------------------------------------------------------------------------------

// Changes one thing somewhere in the tree.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  void operator()(Json& json) {
    std::vector<Json*> all;
    collect(json, all);
    Json& place = *all[below(all.size())];
    switch (below(4)) {
      case 0:
        place = values_[below(values_.size())];
        return;
      case 1: {  // Something else of the same file, which fits better.
        const Json other = *all[below(all.size())];
        place = other;
        return;
      }
      case 2:
        if (place.is_array() && !place.empty()) place.erase(below(place.size()));
        if (place.is_object() && !place.empty()) place.erase(place.begin());
        return;
      default:
        if (place.is_array() && !place.empty()) place.push_back(Json(place[below(place.size())]));
        if (place.is_number_integer()) place = place.get<uint64_t>() + 1;
        return;
    }
  }
  size_t below(size_t limit) {
    return std::uniform_int_distribution<size_t>(0, limit - 1)(random_);
  }

 private:
  static void collect(Json& json, std::vector<Json*>& all) {
    all.push_back(&json);
    if (!json.is_structured()) return;
    for (Json& each : json) collect(each, all);
  }

  const std::vector<Json> values_ = {nullptr,
                                     true,
                                     0,
                                     1,
                                     -1,
                                     INT64_MAX,
                                     INT64_MIN,
                                     UINT64_MAX,
                                     1e308,
                                     "",
                                     "x",
                                     "Infinity",
                                     Json::array(),
                                     Json::object(),
                                     {{"as_none", true}},
                                     {{"as_int", 7}},
                                     {{"as_tensor", {{"name", "x"}}}}};
  std::mt19937_64 random_;
};

class ChanceTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ChanceTest, ChangedProgramsAreLoadedOrRefused) {
  const Records records = records_of(model_path(GetParam()));
  int refused = 0;
  constexpr int kRounds = 400;
  for (const char* record : {kProgram, kWeights}) {
    if (records.count(record) == 0) continue;
    const Json json = Json::parse(records.at(record));
    Mutator mutator(7);
    for (int i = 0; i < kRounds; ++i) {
      Json changed = json;
      for (size_t k = 0; k <= mutator.below(3); ++k) mutator(changed);
      Records other = records;
      other[record] = changed.dump();
      write(other);
      const std::string error = loading();
      if (error.empty()) continue;
      ++refused;
      ASSERT_THAT(error, StartsWith("[load_exported] ")) << i;
    }
  }
  // Else this test looks at nothing.
  EXPECT_GT(refused, kRounds / 10);
}

INSTANTIATE_TEST_SUITE_P(Models, ChanceTest,
                         ::testing::Values("mlp.pt2", "mlp_functional.pt2", "structured.pt2",
                                           "flow.pt2", "attention.pt2"));

}  // namespace
}  // namespace torchlift::compile
