#ifndef TORCHLIFT_CORE_DOMAIN_H_
#define TORCHLIFT_CORE_DOMAIN_H_

// File: core/domain.h
//
// Working for an outer domain while inner levels are open.

#include <cstdint>

#include "core/level.h"

namespace torchlift {

// While it lives, current_level() on this thread is the innermost domain of at most this depth:
// code that works on the values of a level, such as the rule of a custom derivative, must not take
// them into that level again. Levels opened meanwhile are domains as always.
class DomainScope {
 public:
  explicit DomainScope(int64_t depth);
  ~DomainScope() { exchange_domain_limit(saved_); }
  DomainScope(const DomainScope&) = delete;
  DomainScope& operator=(const DomainScope&) = delete;

 private:
  DomainLimit saved_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_DOMAIN_H_
