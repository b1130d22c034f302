#include "compile/import/exported_arguments.h"

#include <ATen/core/jit_type.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "compile/artifact/format_error.h"
#include "compile/import/export_schema.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using c10::TypeKind;

const c10::Type& without_optional(const c10::Type& type) {
  return type.kind() == TypeKind::OptionalType
             ? *type.castRaw<c10::OptionalType>()->getElementType()
             : type;
}

// Where an argument is to go.
struct Place {
  const c10::Argument& parameter;
  const NameScope& scope;
  const std::string& where;

  const c10::Type& type() const { return without_optional(*parameter.type()); }
  TypeKind kind() const { return type().kind(); }
  // Of a list, else of the thing itself.
  TypeKind element_kind() const {
    const auto* list = type().castRaw<c10::ListType>();
    return list == nullptr ? kind() : without_optional(*list->getElementType()).kind();
  }
  bool is_list() const { return kind() == TypeKind::ListType; }
};

template <class Element, class Read>
std::vector<Element> list_of(const Json& json, const std::string& where, Read&& read) {
  std::vector<Element> list;
  for (const Json& each : as_array(json, where)) list.push_back(read(each));
  return list;
}

// --- numbers -------------------------------------------------------------------------------------

// A number, or the same number for each dim: int[2] kernel_size=3.
template <class Number>
Argument once_or_repeated(Number number, const Place& place) {
  if (!place.is_list()) return IValue(number);
  const auto count = static_cast<size_t>(std::max(1, place.parameter.N().value_or(1)));
  c10::List<Number> list;
  for (size_t i = 0; i < count; ++i) list.push_back(number);
  return IValue(std::move(list));
}

Argument read_int(const Json& json, const Place& place) {
  const int64_t number = as_int(json, place.where);
  if (place.element_kind() == TypeKind::FloatType) {
    return once_or_repeated(static_cast<double>(number), place);
  }
  return once_or_repeated(number, place);
}

Argument read_float(const Json& json, const Place& place) {
  return once_or_repeated(as_double(json, place.where), place);
}

Argument read_bool(const Json& json, const Place& place) {
  return once_or_repeated(as_bool(json, place.where), place);
}

Argument read_complex(const Json& json, const Place& place) {
  return IValue(c10::complex<double>(as_double(at(json, "real", place.where), place.where),
                                     as_double(at(json, "imag", place.where), place.where)));
}

Argument read_ints(const Json& json, const Place& place) {
  const auto ints = list_of<int64_t>(json, place.where,
                                     [&](const Json& each) { return as_int(each, place.where); });
  if (place.element_kind() != TypeKind::FloatType) return IValue(ints);
  return IValue(std::vector<double>(ints.begin(), ints.end()));
}

Argument read_floats(const Json& json, const Place& place) {
  return IValue(list_of<double>(json, place.where,
                                [&](const Json& each) { return as_double(each, place.where); }));
}

Argument read_bools(const Json& json, const Place& place) {
  c10::List<bool> list;
  for (const Json& each : as_array(json, place.where)) list.push_back(as_bool(each, place.where));
  return IValue(std::move(list));
}

// --- sizes ---------------------------------------------------------------------------------------

Argument read_sym_int(const Json& json, const Place& place) {
  const SizeExpr size = place.scope.sym_int(json, place.where);
  const bool is_float = place.kind() == TypeKind::FloatType;
  if (const auto number = size.constant()) {
    if (is_float) return IValue(static_cast<double>(*number));
    return once_or_repeated(*number, place);
  }
  if (is_float) return SizeRatio{.factor = 1, .numerator = size, .denominator = 1};
  if (place.is_list()) {
    const auto count = static_cast<size_t>(std::max(1, place.parameter.N().value_or(1)));
    return std::vector<SizeExpr>(count, size);
  }
  return size;
}

Argument read_sym_ints(const Json& json, const Place& place) {
  const auto sizes = list_of<SizeExpr>(
      json, place.where, [&](const Json& each) { return place.scope.sym_int(each, place.where); });
  std::vector<int64_t> numbers;
  for (const SizeExpr& size : sizes) {
    if (const auto number = size.constant()) numbers.push_back(*number);
  }
  if (numbers.size() < sizes.size()) return sizes;
  return IValue(numbers);
}

Argument read_sym_float(const Json& json, const Place& place) {
  SizeRatio ratio = place.scope.sym_float(json, place.where);
  if (ratio.numerator.is_constant() && ratio.denominator.is_constant()) {
    return IValue(ratio.evaluate({}));
  }
  return ratio;
}

// A condition is a number only where the sizes are.
Argument read_sym_bool(const Json& json, const Place& place) {
  const SizeExpr truth = place.scope.size(place.scope.sym_bool(json, place.where));
  return IValue(truth.constant().value_or(0) != 0);
}

// --- tensors -------------------------------------------------------------------------------------

Argument read_tensor(const Json& json, const Place& place) {
  return ValueRef{place.scope.tensor_of(json, place.where)};
}

Argument read_tensors(const Json& json, const Place& place) {
  // Who wrote the file could not tell what an empty list is one of.
  if (as_array(json, place.where).empty() && place.element_kind() != TypeKind::TensorType) {
    return IValue(std::vector<int64_t>());
  }
  return list_of<ValueRef>(json, place.where, [&](const Json& each) {
    return ValueRef{place.scope.tensor_of(each, place.where)};
  });
}

ValueRef optional_tensor(const Json& json, const Place& place) {
  const auto [kind, value] = as_union(json, place.where);
  if (kind == "as_none") return {kNoValue};
  if (kind != "as_tensor") format_error(place.where, " is ", kind, " in a list of tensors.");
  return {place.scope.tensor_of(value, place.where)};
}

Argument read_optional_tensors(const Json& json, const Place& place) {
  return list_of<ValueRef>(json, place.where,
                           [&](const Json& each) { return optional_tensor(each, place); });
}

Argument read_optional_tensor(const Json& json, const Place& place) {
  const ValueRef ref = optional_tensor(json, place);
  if (ref.id == kNoValue) return std::monostate{};
  return ref;
}

// --- the rest ------------------------------------------------------------------------------------

Argument read_none(const Json&, const Place&) { return std::monostate{}; }

Argument read_string(const Json& json, const Place& place) {
  return IValue(as_string(json, place.where));
}

Argument read_scalar_type(const Json& json, const Place& place) {
  return IValue(static_cast<int64_t>(dtype_of(as_int(json, place.where))));
}

Argument read_layout(const Json& json, const Place& place) {
  return IValue(static_cast<int64_t>(layout_of(as_int(json, place.where))));
}

Argument read_memory_format(const Json& json, const Place& place) {
  return IValue(static_cast<int64_t>(memory_format_of(as_int(json, place.where))));
}

Argument read_device(const Json& json, const Place& place) {
  return IValue(device_of(json, place.where));
}

const std::map<std::string, Argument (*)(const Json&, const Place&)> kReaders = {
    {"as_none", &read_none},
    {"as_tensor", &read_tensor},
    {"as_tensors", &read_tensors},
    {"as_optional_tensor", &read_optional_tensor},
    {"as_optional_tensors", &read_optional_tensors},
    {"as_int", &read_int},
    {"as_ints", &read_ints},
    {"as_float", &read_float},
    {"as_floats", &read_floats},
    {"as_bool", &read_bool},
    {"as_bools", &read_bools},
    {"as_complex", &read_complex},
    {"as_string", &read_string},
    {"as_sym_int", &read_sym_int},
    {"as_sym_ints", &read_sym_ints},
    {"as_sym_float", &read_sym_float},
    {"as_sym_bool", &read_sym_bool},
    {"as_scalar_type", &read_scalar_type},
    {"as_layout", &read_layout},
    {"as_memory_format", &read_memory_format},
    {"as_device", &read_device},
};

// Enums are integers in a graph, which must not be other integers.
void check_enum(const std::string& kind, const Place& place) {
  static const std::map<TypeKind, std::string> kEnums = {
      {TypeKind::ScalarTypeType, "as_scalar_type"},
      {TypeKind::LayoutType, "as_layout"},
      {TypeKind::MemoryFormatType, "as_memory_format"},
  };
  const auto wanted = kEnums.find(without_optional(*place.parameter.real_type()).kind());
  const bool is_enum = std::any_of(kEnums.begin(), kEnums.end(),
                                   [&](const auto& each) { return each.second == kind; });
  if (kind == "as_none" || (wanted == kEnums.end() && !is_enum)) return;
  if (wanted == kEnums.end() || wanted->second != kind) {
    format_error(place.where, " is ", kind, ", and should be a ",
                 place.parameter.real_type()->str(), ".");
  }
}

}  // namespace

// --- names ---------------------------------------------------------------------------------------

NameScope::NameScope(const Json& graph, const SizeMeaning& sizes) : graph_(graph), sizes_(sizes) {}

void NameScope::define(const std::string& name, ValueId id) {
  if (!tensors_.emplace(name, id).second) format_error("two tensors are named '", name, "'.");
}

ValueId NameScope::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    format_error("a node reads the tensor '", name, "', which is not defined before.");
  }
  return found->second;
}

ValueId NameScope::tensor_of(const Json& json, const std::string& where) const {
  return tensor(string_at(json, "name", where));
}

const Json& NameScope::named(const char* table, const Json& json, const std::string& where) const {
  const std::string name = as_string(json, where);
  const Json* values = find(graph_, table);
  const Json* value = values == nullptr ? nullptr : find(*values, name.c_str());
  if (value == nullptr) format_error(where, " is '", name, "', which the graph does not define.");
  return *value;
}

SizeExpr NameScope::sym_int(const Json& json, const std::string& where) const {
  const auto [kind, value] = as_union(json, where);
  if (kind == "as_int") return as_int(value, where);
  if (kind != "as_name") format_error(where, " is ", kind, ", no integer.");
  const auto [form, size] = as_union(named("sym_int_values", value, where), where);
  if (form == "as_int") return as_int(size, where);
  if (form != "as_expr") format_error(where, " is ", form, ", no integer.");
  return sizes_.size(parse_size(string_at(size, "expr_str", where)));
}

SizeRatio NameScope::sym_float(const Json& json, const std::string& where) const {
  const auto [kind, value] = as_union(json, where);
  if (kind == "as_float") return {.factor = as_double(value, where)};
  if (kind != "as_name") format_error(where, " is ", kind, ", no float.");
  const auto [form, number] = as_union(named("sym_float_values", value, where), where);
  if (form == "as_float") return {.factor = as_double(number, where)};
  if (form != "as_expr") format_error(where, " is ", form, ", no float.");
  return sizes_.ratio(parse_size(string_at(number, "expr_str", where)));
}

SizeTerm NameScope::sym_bool(const Json& json, const std::string& where) const {
  const auto boolean = [&](const Json& value) {
    SizeTerm term;
    term.number = as_bool(value, where) ? 1 : 0;
    return term;
  };
  const auto [kind, value] = as_union(json, where);
  if (kind == "as_bool") return boolean(value);
  if (kind != "as_name") format_error(where, " is ", kind, ", no bool.");
  const auto [form, condition] = as_union(named("sym_bool_values", value, where), where);
  if (form == "as_bool") return boolean(condition);
  if (form != "as_expr") format_error(where, " is ", form, ", no bool.");
  SizeTerm term = parse_size(string_at(condition, "expr_str", where));
  for_each_leaf(term, [&](const SizeTerm& leaf) { sizes_.size(leaf); });
  return term;
}

TensorType NameScope::type(const std::string& name) const {
  const std::string where = "tensor " + name;
  const Json* meta = find(object_at(graph_, "tensor_values", "a graph"), name.c_str());
  if (meta == nullptr) format_error("the graph does not say what '", name, "' is.");
  return type_of_meta(*meta, sizes_, where);
}

// --- arguments -----------------------------------------------------------------------------------

Argument read_argument(const Json& json, const c10::Argument& parameter, const NameScope& scope,
                       const std::string& where) {
  const auto [kind, value] = as_union(json, where);
  const auto reader = kReaders.find(kind);
  if (reader == kReaders.end()) {
    unsupported_error("import", where, " is an argument of the kind ", kind,
                      ", which graphs do not have.");
  }
  const Place place{parameter, scope, where};
  check_enum(kind, place);
  return reader->second(value, place);
}

Argument default_argument(const c10::Argument& parameter, const std::string& where) {
  const auto& value = parameter.default_value();
  if (!value.has_value()) {
    if (parameter.type()->kind() == TypeKind::OptionalType) return std::monostate{};
    format_error(where, " is not given, and has no default.");
  }
  if (value->isNone()) return std::monostate{};
  return *value;
}

}  // namespace torchlift::compile
