// No exception may leave the library: Python's ctypes cannot catch it, and the process would abort.

#pragma once

#include <exception>

namespace icefall {

constexpr int kOutOfMemory = -9;  // returned by functions of numbers; functions of pointers return null

template <typename Body>
int guarded(Body body) noexcept {
  try {
    return body();
  } catch (const std::exception &) {
    return kOutOfMemory;
  }
}

template <typename Body>
void *guarded_pointer(Body body) noexcept {
  try {
    return body();
  } catch (const std::exception &) {
    return nullptr;
  }
}

}  // namespace icefall
