#include "compile/artifact/npy.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "compile/artifact/bytes.h"
#include "compile/artifact/dtypes.h"
#include "compile/artifact/format_error.h"
#include "compile/artifact/safetensors.h"

namespace torchlift::compile {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr uint64_t kMaxHeaderBytes = 1 << 20;

struct Header {
  std::string descr;
  bool fortran_order = false;
  std::vector<int64_t> shape;
};

// --- the header: a Python dict of three keys -----------------------------------------------------

class HeaderParser {
 public:
  explicit HeaderParser(std::string_view text) : text_(text) {}

  Header run() {
    Header header;
    bool seen[3] = {false, false, false};
    expect('{');
    while (!accept('}')) {
      const std::string key = string();
      expect(':');
      const int index = key == "descr" ? 0 : key == "fortran_order" ? 1 : key == "shape" ? 2 : -1;
      if (index < 0 || seen[index]) fail();
      seen[index] = true;
      if (index == 0) header.descr = descr();
      if (index == 1) header.fortran_order = boolean();
      if (index == 2) header.shape = shape();
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_spaces();
    if (!text_.empty() || !seen[0] || !seen[1] || !seen[2]) fail();
    return header;
  }

 private:
  [[noreturn]] static void fail() {
    format_error(
        "its header is not of the form {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}.");
  }

  void skip_spaces() {
    const size_t first = text_.find_first_not_of(" \t\n");
    text_.remove_prefix(std::min(first, text_.size()));
  }
  bool accept(char c) {
    skip_spaces();
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail();
  }
  bool accept_word(std::string_view word) {
    skip_spaces();
    if (text_.substr(0, word.size()) != word) return false;
    text_.remove_prefix(word.size());
    return true;
  }

  std::string string() {
    const char quote = accept('"') ? '"' : '\'';
    if (quote == '\'') expect('\'');
    const size_t end = text_.find(quote);
    if (end == std::string_view::npos) fail();
    const std::string result(text_.substr(0, end));
    text_.remove_prefix(end + 1);
    return result;
  }

  std::string descr() {
    skip_spaces();
    if (!text_.empty() && text_.front() == '[') {
      format_error("it holds records of several fields; save each field as an array of its own.");
    }
    return string();
  }

  bool boolean() {
    if (accept_word("True")) return true;
    if (!accept_word("False")) fail();
    return false;
  }

  std::vector<int64_t> shape() {
    std::vector<int64_t> sizes;
    expect('(');
    while (!accept(')')) {
      skip_spaces();
      int64_t size = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), size);
      if (error != std::errc()) fail();
      text_.remove_prefix(static_cast<size_t>(end - text_.data()));
      accept('L');  // a long of Python 2
      sizes.push_back(size);
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return sizes;
  }

  std::string_view text_;
};

at::ScalarType dtype_of(const std::string& descr) {
  const char order = descr.empty() ? '?' : descr[0];
  const char kind = descr.size() < 2 ? '?' : descr[1];
  int bytes = 0;
  if (descr.size() > 2) std::from_chars(descr.data() + 2, descr.data() + descr.size(), bytes);
  if (kind == 'O') {
    format_error("it holds Python objects ('", descr, "'), and only numbers can be read.");
  }
  if (order == '>') {
    format_error("its numbers are big endian ('", descr,
                 "'); convert them by x.astype(x.dtype.newbyteorder('<')).");
  }
  const DtypeNames* found = order == '<' || order == '|' || order == '='
                                ? find_npy_dtype(kind, static_cast<size_t>(std::max(bytes, 0)))
                                : nullptr;
  if (found == nullptr) {
    format_error("its dtype is '", descr, "', which torch has not",
                 kind == 'V' ? " (NumPy has no bfloat16 and no float8: use .safetensors)." : ".");
  }
  return found->dtype;
}

struct Place {
  Header header;
  uint64_t numbers = 0;  // where they begin
};

Place read_place(const ByteSource& source) {
  char begin[12] = {};
  const uint64_t there = std::min<uint64_t>(source.size(), sizeof(begin));
  source.read(0, there, begin);
  if (there < 10 || std::string_view(begin, kMagic.size()) != kMagic) {
    format_error("this is no .npy file: it does not begin as one.");
  }
  const int version = begin[6];
  if (version < 1 || version > 3) {
    format_error("it is of version ", version, " of the format; 1 to 3 can be read.");
  }
  const uint64_t length_bytes = version == 1 ? 2 : 4;
  uint32_t length = 0;
  std::memcpy(&length, begin + 8, length_bytes);
  if (length > kMaxHeaderBytes) format_error("its header would have ", length, " bytes.");
  const std::string text = source.read_string(8 + length_bytes, length);
  return {HeaderParser(text).run(), 8 + length_bytes + length};
}

std::vector<int64_t> fortran_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides;
  int64_t stride = 1;
  for (const int64_t size : sizes) {
    strides.push_back(stride);
    stride *= std::max<int64_t>(size, 1);
  }
  return strides;
}

at::Tensor read_npy(const ByteSource& source) {
  const Place place = read_place(source);
  const std::vector<int64_t>& sizes = place.header.shape;
  const at::ScalarType dtype = dtype_of(place.header.descr);
  const uint64_t needed = checked_bytes(sizes, c10::elementSize(dtype));
  const uint64_t there = source.size() - place.numbers;
  if (needed != there) {
    format_error("its shape needs ", needed, " bytes, and ", there, " follow the header",
                 there < needed ? ": it is cut." : ".");
  }
  at::Tensor tensor = at::empty(sizes, at::TensorOptions().dtype(dtype));
  if (needed > 0) {
    source.read(place.numbers, needed, tensor.mutable_data_ptr());
    if (dtype == at::kBool) check_bools(tensor.const_data_ptr(), needed);
  }
  return place.header.fortran_order ? tensor.as_strided(sizes, fortran_strides(sizes)) : tensor;
}

// --- writing -------------------------------------------------------------------------------------

std::string header_text(const at::Tensor& tensor) {
  const DtypeNames* dtype = find_dtype(tensor.scalar_type());
  if (dtype == nullptr || dtype->npy_kind == 0) {
    format_error("NumPy has no ", dtype_name(tensor.scalar_type()),
                 ". Write a .safetensors file, or convert the tensor to float32.");
  }
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  std::string text = "{'descr': '";
  text += bytes == 1 ? '|' : '<';
  text += dtype->npy_kind;
  text += std::to_string(bytes) + "', 'fortran_order': False, 'shape': (";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? "" : " ") + std::to_string(tensor.size(i)) + ",";
  }
  if (tensor.dim() > 1) text.pop_back();
  return text + "), }";
}

void write_npy(const at::Tensor& tensor, const std::string& path) {
  if (!tensor.defined()) format_error("the tensor is undefined.");
  if (tensor.layout() != c10::kStrided) format_error("only strided tensors can be written.");
  std::string text = header_text(tensor);
  // The numbers begin at a multiple of 64.
  const size_t before = kMagic.size() + 4;
  text.append(63 - (before + text.size()) % 64, ' ');
  text += '\n';
  const auto length = static_cast<uint16_t>(text.size());
  const at::Tensor numbers = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
  FileWriter file(path);
  file.write(kMagic);
  file.write("\x01\x00", 2);
  file.write(&length, sizeof(length));
  file.write(text);
  file.write(numbers.const_data_ptr(), numbers.nbytes());
  file.finish();
}

}  // namespace

at::Tensor load_npy(const std::string& path) {
  return naming_file("load", path, [&] { return read_npy(FileBytes(path)); });
}

void save_npy(const at::Tensor& tensor, const std::string& path) {
  naming_file("save", path, [&] { write_npy(tensor, path); });
}

}  // namespace torchlift::compile
