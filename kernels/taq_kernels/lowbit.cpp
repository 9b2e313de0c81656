// y[M, N] = x[M, K] W^T + bias with W in 4- and 8-bit codes, on x86 CPUs with AVX2, AVX-512 or AVX-512 and VNNI.
//
// A matrix of N rows and K columns has a code q (0 .. 2^bits - 1) per weight and a scale s, and possibly a zero point z
// (otherwise 2^(bits-1)), per row and group of 32, 64 or 128 columns: w = (q - z) * s.
//
// Layout. Rows in tiles of 64, the last tile padded; a tile is one forward stream of 256-byte steps, and a step is four
// cells of 64 bytes, one for each 16 rows. Codes are kept as two's complement, c = q - 2^(bits-1).
//   4 bits  a cell is 16 rows x 8 columns: a 32-bit lane per row; its low 16-bit word has the even columns, the high
//           word the odd ones, lowest column in the lowest nibble. So a lane serves 32-bit instructions, one column at
//           a time, and vpdpwssd, which wants pairs of columns; and the nibbles are indices that vpermps and vpermw
//           look up without a mask, because they ignore an index's upper bits.
//   8 bits  a cell is 4 columns x 16 rows, one byte each, so that vpmovsxbd reads a column from memory.
//   Scales [tile][K / group][64] in the dtype of the checkpoint; zero points the same, uint8; none if all are 2^(bits-1).
//
// Products. 16 (or 8) rows sit in the lanes of a vector, x is broadcast: no horizontal sums, and scales and zero points
// are plain vectors. Codes are exact in float32 and in int16, so weights are never rounded; per group
//   total += s * (sum c x - (z - 2^(bits-1)) * sum x)
// in float32, columns in order. A token's result depends neither on the other tokens nor on the number of threads.
// (lowbit_linear's. With AMX, and from cpu.py's AMX_FROM_TOKENS on, cpu.py multiplies by what lowbit_dequantize gives:
// weights are rounded then, 1.4 times the error, and a token's result depends on which side its batch is.)
//
// With VNNI, sums of a group are exact integers, but x is rounded first: to int16 in units of u, a power of two with
// 2^14 u <= max |x| < 2^15 u over the token's group. For bf16, of 8 bits itself, that is exact from max |x| / 2^7 on, for
// fp16, of 11, from max |x| / 2^4 on; what is smaller is off by u / 2 at most, 0.29 u RMS.
//   Where more than half of a group, zeros not counted, is below 2^8 u (fp16: 2^11 u), a second pass adds 15 bits. So x
//   loses less than 0.29 / 2^8 = 1.1e-3 of its median (fp16: 1.4e-4), even if the weights of an outlier are 0 and only
//   the others count. With the second pass bf16 is exact from max |x| / 2^22 on. (Below max |x| = 2^-97 there is none,
//   and below 2^-112 u stays 2^-126.)
//   Usually it is far less. The largest of a group is at most sqrt(128) times its RMS; with weights of one size the
//   result is off by at most 0.29 * 2^-14 * 11.3 = 2e-4 of its RMS.
//   Rounding the result, for comparison, is 1.1e-3 to 2.3e-3 in bf16, 1.4e-4 to 2.8e-4 in fp16.
//
// Few tokens: a code is unpacked into a register and multiplied with every token at once. Many: a group of a tile is
// unpacked into the L1 cache and multiplied like a dense matrix.
//
// lowbit_isa.h has the code that depends on the instruction set. It is included once for each, its functions carry
// target attributes: this file is compiled without -march and the library runs on, or declines, every x86-64 CPU.
// The library needs no C++ runtime and no header of Python or torch. OpenMP is called by its ABI, not by pragma: with
// -fopenmp a second runtime (the compiler's) would be loaded beside torch's, with threads of its own.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__x86_64__)
#error "lowbit.cpp is for x86-64"
#endif

// Exported by libgomp, and for its sake by LLVM's and Intel's runtimes too; torch loads one of them globally.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);

namespace {

enum Isa { kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3 };
enum DType { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Status { kOk = 0, kNoMemory = 1, kBadArgument = 2 };

constexpr int kTile = 64;        // rows
constexpr int kStep = 256;       // bytes
constexpr int kCell = 64;        // bytes
constexpr int kBlock = 32;       // columns: the unit in which x is laid out, divides every group
constexpr int kMaxGroup = 128;   // columns
constexpr int kMaxChunk = 192;   // tokens: their totals (64 rows x 4 tiles) and a group of x stay in a 1 MB L2 cache
constexpr int kMaxItem = 4;      // tiles that share one pass over x,
constexpr int kSharing = 33;     // from this many tokens on
// Bytes ahead of the weights in use. One token, ms (reading the same bytes takes 0.61 and 1.18): 4 bits 0.65, 8 bits
// 1.06; with only an L1 prefetch 8 KB ahead 0.68 and 1.24, with none 1.0 and 1.7. A tile is one stream; its successor's
// first lines are fetched at its end.
constexpr int kPrefetchL2 = 16384, kPrefetchL1 = 2048;

constexpr int64_t step_columns(int bits) { return bits == 4 ? 8 : 4; }
constexpr int64_t tile_bytes(int bits, int64_t columns) { return kTile * columns * bits / 8; }
constexpr int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Tile {
  int bits;
  const uint8_t* weights;
  const uint8_t* scales;
  const uint8_t* zero_points;  // or null
  int64_t first;               // its first row among those of all shards
  int rows;                    // without padding
};

// What all threads of a call share. x_panel: [K / kBlock][tokens] blocks of kBlock columns, as the instruction set
// wants them; x_groups: [K / group][tokens] XGroup of the instruction set. Both once for each of its passes over x.
struct Call {
  int threads, x_dtype, scale_dtype, group_size;
  int64_t tokens, columns;
  const uint8_t* x;
  const uint8_t* weights;
  const uint8_t* scales;
  const uint8_t* zero_points;
  int shards;
  const int64_t* bits;
  const int64_t* rows;
  const uint8_t* bias;
  uint8_t* y;
  int64_t y_stride;  // elements: rows of all shards

  void* x_panel;
  void* x_groups;
  uint8_t* scratch;  // scratch_bytes for each thread
  int64_t scratch_bytes;
  int64_t tiles;
  int item_tiles;

  int64_t groups() const { return columns / group_size; }
  // From one pass over x to the next, in x_panel (of words) and in x_groups.
  int64_t pass_words(int block_words) const { return tokens * (columns / kBlock) * block_words; }
  int64_t pass_groups() const { return tokens * groups(); }

  Tile tile(int64_t index) const {
    int64_t first = 0, weight_offset = 0, skipped = 0;
    for (int i = 0; i < shards; i++) {
      const int64_t count = (rows[i] + kTile - 1) / kTile, size = tile_bytes(int(bits[i]), columns);
      if (index < count) {
        const int64_t group = (skipped + index) * groups() * kTile, left = rows[i] - index * kTile;
        return {int(bits[i]),
                weights + weight_offset + index * size,
                scales + group * element_size(scale_dtype),
                zero_points ? zero_points + group : nullptr,
                first + index * kTile,
                int(left < kTile ? left : kTile)};
      }
      index -= count, skipped += count, weight_offset += count * size, first += rows[i];
    }
    return {};
  }
};

// Work for `threads` threads: they take items 0 .. count-1 as they become free.
struct Team {
  void (*function)(const Call&, int64_t item, uint8_t* scratch);
  const Call* call;
  int64_t count;
  int64_t next_item;
  int64_t next_thread;

  static void work(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int64_t thread = __atomic_fetch_add(&team.next_thread, 1, __ATOMIC_RELAXED);
    uint8_t* scratch = team.call->scratch + thread * team.call->scratch_bytes;
    for (;;) {
      const int64_t item = __atomic_fetch_add(&team.next_item, 1, __ATOMIC_RELAXED);
      if (item >= team.count) return;
      team.function(*team.call, item, scratch);
    }
  }

  static void run(void (*function)(const Call&, int64_t, uint8_t*), const Call& call, int64_t count, bool parallel) {
    Team team{function, &call, count, 0, 0};
    // Always the same number of threads: for another one libgomp ends threads and starts new ones.
    if (parallel && call.threads > 1) GOMP_parallel(work, &team, unsigned(call.threads), 0);
    else work(&team);
  }
};

#define LOWBIT_NAMESPACE avx2
#define LOWBIT_LANES 8
#define LOWBIT_DOT 0
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "lowbit_isa.h"

#define LOWBIT_NAMESPACE avx512
#define LOWBIT_LANES 16
#define LOWBIT_DOT 0
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#include "lowbit_isa.h"

#define LOWBIT_NAMESPACE avx512_vnni
#define LOWBIT_LANES 16
#define LOWBIT_DOT 1
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#include "lowbit_isa.h"

struct Kernels {
  int64_t panel_bytes;    // of one token's block in the panel, in all passes,
  int64_t x_group_bytes;  // and of its XGroups
  void (*pack_x)(const Call&, int64_t token, uint8_t*);
  void (*multiply)(const Call&, int64_t item, uint8_t* scratch);
  void (*dequantize)(const Call&, int64_t tile, uint8_t* scratch);
};

constexpr Kernels kKernels[] = {
    {},
    {avx2::kPanelBytes, avx2::kXGroupBytes, avx2::pack_x, avx2::multiply, avx2::dequantize},
    {avx512::kPanelBytes, avx512::kXGroupBytes, avx512::pack_x, avx512::multiply, avx512::dequantize},
    {avx512_vnni::kPanelBytes, avx512_vnni::kXGroupBytes, avx512_vnni::pack_x, avx512_vnni::multiply, avx512::dequantize},
};

bool supported(int isa) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == kAvx2) return avx2;
  if (isa == kAvx512) return avx512;
  return isa == kAvx512Vnni && avx512 && __builtin_cpu_supports("avx512vnni");
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

bool known(int64_t bits) { return bits == 4 || bits == 8; }

int64_t count_tiles(int shards, const int64_t* rows) {
  int64_t tiles = 0;
  for (int i = 0; i < shards; i++) tiles += (rows[i] + kTile - 1) / kTile;
  return tiles;
}

// The 16 bits of 4 columns, 2 apart, from a nibble in each second byte.
uint32_t gather_nibbles(uint64_t v) { return uint32_t((v | v >> 12 | v >> 24 | v >> 36) & 0xffff); }

uint64_t scatter_nibbles(uint64_t v) {
  return (v & 0xf) | (v & 0xf0) << 12 | (v & 0xf00) << 24 | (v & 0xf000) << 36;
}

}  // namespace

extern "C" {

int lowbit_supported(int isa) { return supported(isa); }

// The fastest instruction set of this CPU for activations of a dtype; 0 if there is none.
// What a core of an Intel Xeon (3 GHz) was measured to do, in G multiply-adds/s: vpdpwssd 194, float32 FMA 93,
// vdpbf16ps 46 (one every other cycle; there is no code for it).
int lowbit_best(int x_dtype) {
  if (x_dtype != kFloat32 && supported(kAvx512Vnni)) return kAvx512Vnni;
  return supported(kAvx512) ? kAvx512 : supported(kAvx2) ? kAvx2 : 0;
}

// Bytes of a packed matrix.
int64_t lowbit_packed_bytes(int bits, int64_t rows, int64_t columns) {
  return round_up(rows, kTile) / kTile * tile_bytes(bits, columns);
}

// codes: [rows, columns] uint8, columns a multiple of 32; packed: lowbit_packed_bytes. Padding holds code 2^(bits-1).
void lowbit_pack(int bits, const uint8_t* codes, int64_t rows, int64_t columns, uint8_t* packed) {
  // 32 columns of each row in turn: a cache line of codes is read once, and their 1 or 2 KB of steps stay in L1.
  memset(packed, 0, size_t(lowbit_packed_bytes(bits, rows, columns)));
  for (int64_t row = 0; row < round_up(rows, kTile); row += kTile)
    for (int64_t block = 0; block < columns; block += kBlock)
      for (int64_t r = row; r < row + kTile && r < rows; r++) {
        const uint8_t* in = codes + r * columns + block;
        const int64_t cell = r % kTile / 16, lane = r % 16;
        uint8_t* out = packed + row / kTile * tile_bytes(bits, columns) + block / step_columns(bits) * kStep + cell * kCell;
        if (bits == 4)
          for (int k = 0; k < kBlock; k += 8, out += kStep) {
            uint64_t eight;
            memcpy(&eight, in + k, 8);
            eight ^= 0x0808080808080808;
            const uint32_t word = gather_nibbles(eight & 0x000f000f000f000f) |
                                  gather_nibbles(eight >> 8 & 0x000f000f000f000f) << 16;
            memcpy(out + lane * 4, &word, 4);
          }
        else
          for (int k = 0; k < kBlock; k += 4, out += kStep)
            for (int j = 0; j < 4; j++) out[j * 16 + lane] = in[k + j] ^ 0x80;
      }
}

// The inverse of lowbit_pack.
void lowbit_unpack(int bits, const uint8_t* packed, int64_t rows, int64_t columns, uint8_t* codes) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < columns; k += step_columns(bits)) {
      const uint8_t* cell = packed + r / kTile * tile_bytes(bits, columns) + k / step_columns(bits) * kStep +
                            r % kTile / 16 * kCell;
      uint8_t* out = codes + r * columns + k;
      if (bits == 4) {
        uint32_t word;
        memcpy(&word, cell + r % 16 * 4, 4);
        const uint64_t eight = scatter_nibbles(word & 0xffff) | scatter_nibbles(word >> 16) << 8;
        const uint64_t shifted = eight ^ 0x0808080808080808;
        memcpy(out, &shifted, 8);
      } else {
        for (int j = 0; j < 4; j++) out[j] = cell[j * 16 + r % 16] ^ 0x80;
      }
    }
}

// y[tokens, sum rows] = x[tokens, columns] [W_0; W_1; ...]^T + bias; y, x and bias have x_dtype, all are contiguous.
// The shards' packed weights, scales and zero points follow one another. zero_points and bias may be null.
int lowbit_linear(int isa, int threads, int x_dtype, const uint8_t* x, int64_t tokens, int64_t columns, int group_size,
                  int shards, const int64_t* bits, const int64_t* rows, const uint8_t* weights, const uint8_t* scales,
                  int scale_dtype, const uint8_t* zero_points, const uint8_t* bias, uint8_t* y) {
  if (!supported(isa) || (isa == kAvx512Vnni && x_dtype == kFloat32)) return kBadArgument;
  for (int i = 0; i < shards; i++)
    if (!known(bits[i])) return kBadArgument;
  const Kernels& kernels = kKernels[isa];
  Call call{};
  call.threads = threads, call.x_dtype = x_dtype, call.scale_dtype = scale_dtype;
  call.group_size = group_size, call.columns = columns;
  call.weights = weights, call.scales = scales, call.zero_points = zero_points;
  call.shards = shards, call.bits = bits, call.rows = rows, call.bias = bias;
  for (int i = 0; i < shards; i++) call.y_stride += rows[i];
  call.tiles = count_tiles(shards, rows);

  const int64_t chunks = (tokens + kMaxChunk - 1) / kMaxChunk;
  const int64_t chunk = chunks ? (tokens + chunks - 1) / chunks : 0;
  // Items of several tiles where there are enough of them for all threads and reading x again costs.
  const int64_t shared = chunk >= kSharing ? call.tiles / (4 * threads) : 1;
  call.item_tiles = int(shared < 1 ? 1 : shared > kMaxItem ? kMaxItem : shared);

  const int64_t panel = round_up(chunk * (columns / kBlock) * kernels.panel_bytes, 64);
  const int64_t x_groups = round_up(chunk * call.groups() * kernels.x_group_bytes, 64);
  call.scratch_bytes = kMaxGroup * kTile * 4 + call.item_tiles * chunk * kTile * 4;
  uint8_t* memory = static_cast<uint8_t*>(aligned_alloc(64, size_t(panel + x_groups + threads * call.scratch_bytes)));
  if (!memory) return kNoMemory;
  call.x_panel = memory;
  call.x_groups = memory + panel;
  call.scratch = memory + panel + x_groups;

  for (int64_t first = 0; first < tokens; first += chunk) {
    call.tokens = tokens - first < chunk ? tokens - first : chunk;
    call.x = x + first * columns * element_size(x_dtype);
    call.y = y + first * call.y_stride * element_size(x_dtype);
    // Up to 64 K elements take one thread 10 us, about what waking the others may cost.
    Team::run(kernels.pack_x, call, call.tokens, call.tokens * columns > 65536);
    Team::run(kernels.multiply, call, (call.tiles + call.item_tiles - 1) / call.item_tiles, true);
  }
  free(memory);
  return kOk;
}

// Weights of one matrix, rounded to out_dtype: out[columns, rows padded to 64], columns first.
int lowbit_dequantize(int isa, int threads, int bits, int64_t rows, int64_t columns, int group_size,
                      const uint8_t* weights, const uint8_t* scales, int scale_dtype, const uint8_t* zero_points,
                      int out_dtype, uint8_t* out) {
  if (!supported(isa) || !known(bits)) return kBadArgument;
  const int64_t bits_of[1] = {bits}, rows_of[1] = {rows};
  Call call{};
  call.threads = threads, call.x_dtype = out_dtype, call.scale_dtype = scale_dtype;
  call.group_size = group_size, call.columns = columns;
  call.weights = weights, call.scales = scales, call.zero_points = zero_points;
  call.shards = 1, call.bits = bits_of, call.rows = rows_of;
  call.tiles = count_tiles(1, rows_of);
  call.y = out, call.y_stride = round_up(rows, kTile);
  call.scratch_bytes = kMaxGroup * kTile * 4;
  call.scratch = static_cast<uint8_t*>(aligned_alloc(64, size_t(threads * call.scratch_bytes)));
  if (!call.scratch) return kNoMemory;
  Team::run(kKernels[isa].dequantize, call, call.tiles, true);
  free(call.scratch);
  return kOk;
}

}  // extern "C"
