#include "compile/import/json.h"

#include <limits>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

// A graph in a graph has about ten levels of its own.
constexpr int kMaxDepth = 200;

[[noreturn]] void fail(const Json& value, const std::string& where, const char* kind) {
  format_error(where, " is a JSON ", value.type_name(), ", and should be ", kind, ".");
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  const auto check = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxDepth) format_error(where, " is nested deeper than ", kMaxDepth, ".");
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    format_error(where, " is no JSON: ", error.what(), ".");
  }
}

const Json& at(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) fail(object, where, "an object");
  const auto found = object.find(key);
  if (found == object.end()) format_error(where, " has no '", key, "'.");
  return *found;
}

const Json& object_at(const Json& object, const char* key, const std::string& where) {
  const Json& value = at(object, key, where);
  if (!value.is_object()) fail(value, where + "'s " + key, "an object");
  return value;
}

const Json& array_at(const Json& object, const char* key, const std::string& where) {
  return as_array(at(object, key, where), where + "'s " + key);
}

std::string string_at(const Json& object, const char* key, const std::string& where) {
  return as_string(at(object, key, where), where + "'s " + key);
}

bool bool_at(const Json& object, const char* key, const std::string& where) {
  return as_bool(at(object, key, where), where + "'s " + key);
}

const Json* find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

int64_t as_int(const Json& value, const std::string& where) {
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  const bool fits =
      value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= kMax);
  if (!fits) fail(value, where, "a whole number of 64 bits");
  return value.get<int64_t>();
}

double as_double(const Json& value, const std::string& where) {
  if (value.is_number()) return value.get<double>();
  if (value == "Infinity") return std::numeric_limits<double>::infinity();
  if (value == "-Infinity") return -std::numeric_limits<double>::infinity();
  if (value == "NaN") return std::numeric_limits<double>::quiet_NaN();
  fail(value, where, "a number");
}

bool as_bool(const Json& value, const std::string& where) {
  if (!value.is_boolean()) fail(value, where, "true or false");
  return value.get<bool>();
}

std::string as_string(const Json& value, const std::string& where) {
  if (!value.is_string()) fail(value, where, "a string");
  std::string text = value.get<std::string>();
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) format_error(where, " has control characters.");
  }
  return text;
}

const Json& as_array(const Json& value, const std::string& where) {
  if (!value.is_array()) fail(value, where, "a list");
  return value;
}

std::pair<std::string, const Json&> as_union(const Json& value, const std::string& where) {
  if (!value.is_object() || value.size() != 1) {
    fail(value, where, "an object with one field, which says what it is");
  }
  return {value.begin().key(), *value.begin()};
}

}  // namespace torchlift::compile
