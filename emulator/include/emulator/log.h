// The launches that were made, for tests that count them.
#pragma once

#include <vector>

#include "emulator/grid.h"

namespace tokenprune::emulator {

std::vector<LaunchRecord>& launch_log();

}  // namespace tokenprune::emulator
