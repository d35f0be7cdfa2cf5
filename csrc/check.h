// One error macro: every message says what came and what was wanted.
#pragma once
#include <sstream>
#include <stdexcept>

namespace rf {

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace rf

// RF_CHECK(c == 64, "expected 64 channels, got ", c)
#define RF_CHECK(condition, ...)               \
  do {                                         \
    if (!(condition)) ::rf::fail(__VA_ARGS__); \
  } while (0)
