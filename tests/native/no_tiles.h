// A system that does not let a process use AMX, for a processor that has it or has it in software: what asks for its
// tiles all the same ends the process. Included after amx.h.
#pragma once

#include <immintrin.h>
#include <unistd.h>

#include <cstdlib>

#undef syscall
#undef _tile_loadconfig
#undef _tile_storeconfig
#define syscall(...) (-1)
#define _tile_loadconfig(from) std::abort()
#define _tile_storeconfig(to) std::abort()
