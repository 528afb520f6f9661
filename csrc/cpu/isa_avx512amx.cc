// What AVX-512 with the tile registers of AMX has beyond isa_avx512bf16.cc. Everything lies in an anonymous namespace:
// no symbol of this file may be shared with code compiled for a lesser machine.
#include <immintrin.h>

#include "call.h"

// GCC 12 takes the undefined pass-through operand of its own intrinsics for an uninitialised read (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace attnkit::cpu {
namespace {
#include "simd_avx512-inl.h"
#include "level-inl.h"
#include "kernel_bf16-inl.h"
#include "simd_amx-inl.h"
#include "decode_amx-inl.h"
#include "code_pairs-inl.h"
#include "code_amx-inl.h"
#include "kernel_amx-inl.h"
#include "backward_bf16-inl.h"
#include "backward_amx-inl.h"
}  // namespace

Kernel with_tile_registers(const Kernel& dots) {
  Kernel found = dots;
  found.name = "avx512amx";
  found.run = run_on_tiles;
  found.gather = gather_on_tiles;
  found.carry.select = select_on_tiles;
  found.carry.backward_bytes = carried_backward_bytes_on_tiles;
  found.carry.backward = carried_backward_on_tiles;
  found.backward_bytes = backward_bytes_on_tiles;
  found.backward = backward_on_tiles;
  return found;
}

}  // namespace attnkit::cpu
