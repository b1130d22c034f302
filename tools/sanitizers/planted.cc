// One planted error for each sanitizer: sanitizers_test.py checks that each is caught.
#include <climits>
#include <cstring>
#include <iostream>
#include <thread>

namespace {

int* volatile g_pointer = nullptr;
volatile int g_large = INT_MAX;
int g_shared = 0;

void UseAfterFree() {
  g_pointer = new int[4]();
  int* const stale = g_pointer;
  delete[] g_pointer;
  std::cout << stale[1] << "\n";
}

void Leak() {
  g_pointer = new int[100];
  g_pointer = nullptr;
}

void Overflow() { std::cout << g_large + 1 << "\n"; }

void Race() {
  const auto count = [] {
    for (int i = 0; i < 10000; ++i) ++g_shared;
  };
  std::thread first(count);
  std::thread second(count);
  first.join();
  second.join();
  std::cout << g_shared << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  const char* which = argc == 2 ? argv[1] : "";
  if (std::strcmp(which, "use_after_free") == 0) UseAfterFree();
  if (std::strcmp(which, "leak") == 0) Leak();
  if (std::strcmp(which, "overflow") == 0) Overflow();
  if (std::strcmp(which, "race") == 0) Race();
  return 0;
}
