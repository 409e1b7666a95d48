#pragma once

// Switches of the environment, to bisect and to compare on a GPU without another build. Every call
// reads them.
//   SPECEXTEND_ATTENTION=portable   never the Hopper kernels
//   SPECEXTEND_ATTENTION=hopper     them alone: a call that they do not serve is an error
//   SPECEXTEND_PDL=0                no kernel begins before the one in front of it has ended
//                                   (programmatic dependent launch)

#include <cstdlib>
#include <string>

#include "check.h"

namespace specextend {

enum class AttentionFamily { kBest, kPortable, kHopper };

inline std::string switch_value(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

inline AttentionFamily attention_family(const char* op) {
  const std::string value = switch_value("SPECEXTEND_ATTENTION");
  STD_TORCH_CHECK(value.empty() || value == "portable" || value == "hopper", op,
                  ": SPECEXTEND_ATTENTION must be portable or hopper, got ", value);
  return value.empty()         ? AttentionFamily::kBest
         : value == "portable" ? AttentionFamily::kPortable
                               : AttentionFamily::kHopper;
}

inline bool programmatic_launch(const char* op) {
  const std::string value = switch_value("SPECEXTEND_PDL");
  STD_TORCH_CHECK(value.empty() || value == "0" || value == "1", op,
                  ": SPECEXTEND_PDL must be 0 or 1, got ", value);
  return value != "0";
}

}  // namespace specextend
