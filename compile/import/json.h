#ifndef TORCHLIFT_COMPILE_IMPORT_JSON_H_
#define TORCHLIFT_COMPILE_IMPORT_JSON_H_

// File: compile/import/json.h
//
// JSON that nobody vouches for: every look at it says what must be there, and throws a FormatError
// (compile/artifact/format_error.h) where it is not. `where` is how the errors call the object.
//
//   const Json json = parse_json(text, "models/model.json");
//   const Json& nodes = array_at(json, "nodes", "the graph");
//   for (const Json& node : nodes) string_at(node, "target", "a node");

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

namespace torchlift::compile {

using Json = nlohmann::json;

Json parse_json(std::string_view text, const std::string& where);

// A field of an object.
const Json& at(const Json& object, const char* key, const std::string& where);
const Json& object_at(const Json& object, const char* key, const std::string& where);
const Json& array_at(const Json& object, const char* key, const std::string& where);
std::string string_at(const Json& object, const char* key, const std::string& where);
bool bool_at(const Json& object, const char* key, const std::string& where);
// Null where the object has no such field, or null in it.
const Json* find(const Json& object, const char* key);

// A value as something.
int64_t as_int(const Json& value, const std::string& where);
// Python writes those that JSON has no number for as strings: "Infinity", "-Infinity", "NaN".
double as_double(const Json& value, const std::string& where);
bool as_bool(const Json& value, const std::string& where);
std::string as_string(const Json& value, const std::string& where);
const Json& as_array(const Json& value, const std::string& where);

// One of several things: an object with one field, whose name says which.
std::pair<std::string, const Json&> as_union(const Json& value, const std::string& where);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_JSON_H_
