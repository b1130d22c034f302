#include "core/domain.h"

namespace torchlift {

DomainScope::DomainScope(int64_t depth)
    : saved_(exchange_domain_limit({depth, static_cast<int64_t>(level_stack().size())})) {}

}  // namespace torchlift
