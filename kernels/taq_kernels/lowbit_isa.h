// The product for one instruction set; included by lowbit.cpp once for each, with
//   LOWBIT_NAMESPACE  its name
//   LOWBIT_LANES      32-bit lanes of a vector: 8 (AVX2) or 16 (AVX-512)
//   LOWBIT_DOT        1: a lane holds two columns in bf16 (vdpbf16ps); 0: one in float32 (FMA)
//   TARGET            the attribute that lets a function use it
// "Word" means the 32 bits of a lane: LOWBIT_DOT + 1 columns.

namespace LOWBIT_NAMESPACE {

#define INLINE TARGET __attribute__((always_inline)) inline

constexpr int kLanes = LOWBIT_LANES;
constexpr int kWordColumns = LOWBIT_DOT ? 2 : 1;
constexpr int kBlockWords = kBlock / kWordColumns;
constexpr int kVectors = kTile / kLanes;  // in the 64 rows of a tile

#if LOWBIT_LANES == 16

typedef __m512 Floats;
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats broadcast(float v) { return _mm512_set1_ps(v); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }           // c + ab
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }     // c - ab
INLINE Floats from_unsigned_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE Floats from_signed_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// kLanes values from element `index` of an array, as float32.
INLINE Floats load_as(int dtype, const uint8_t* p, int64_t index) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm512_loadu_ps(p);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The reverse, rounded to nearest even.
INLINE void store_as(int dtype, uint8_t* p, int64_t index, Floats v) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm512_storeu_ps(p, v);
  __m256i half;
  if (dtype == kFloat16) {
    half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i word = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#else

typedef __m256 Floats;
typedef uint32_t Words __attribute__((vector_size(32)));

INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats broadcast(float v) { return _mm256_set1_ps(v); }
INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE Floats from_unsigned_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE Floats from_signed_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

INLINE Floats load_as(int dtype, const uint8_t* p, int64_t index) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (dtype == kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void store_as(int dtype, uint8_t* p, int64_t index, Floats v) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm256_storeu_ps(reinterpret_cast<float*>(p), v);
  __m128i half;
  if (dtype == kFloat16) {
    half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m256i word = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

#endif

// Unpack<bits>: load() reads the part of a step that belongs to vector v of the tile's rows, at() gives word j of it,
// j < kWords. kOffset is added to every code (what the tables hold), to be taken off again through the sum of x.

constexpr int64_t cell_offset(int v) { return kLanes == 16 ? v * kCell : v / 2 * kCell; }

template <int BITS>
struct Unpack;

#if LOWBIT_DOT

template <>
struct Unpack<4> {
  static constexpr int kWords = 4;
  static constexpr float kOffset = 0;
  typedef __m512i Raw;
  __m512i table;  // bf16 of the 16 codes, twice over: vpermw looks at 5 bits
  INLINE Unpack() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = bf16_bits(float((i % 16 ^ 8) - 8));
    table = _mm512_load_si512(values);
  }
  static INLINE uint16_t bf16_bits(float v) {
    uint32_t word;
    memcpy(&word, &v, 4);
    return uint16_t(word >> 16);
  }
  INLINE Raw load(const uint8_t* step, int v) const { return _mm512_loadu_si512(step + cell_offset(v)); }
  INLINE Floats at(Raw raw, int j) const {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16((__m512i)((Halves)raw >> (4 * j)), table));
  }
};

template <>
struct Unpack<8> {
  static constexpr int kWords = 2;
  static constexpr float kOffset = 0.5f;
  struct Raw {
    __m512i words[2];
  };
  // c + 0.5 is sign and magnitude m + 0.5, m = 0 .. 127: 8 significant bits, exact in bf16. Tables of its two bytes.
  __m512i low[2], high[2], interleave[2];
  INLINE Unpack() {
    alignas(64) uint8_t lows[128], highs[128], order[128];
    for (int m = 0; m < 128; m++) {
      const uint16_t value = Unpack<4>::bf16_bits(float(m) + 0.5f);
      lows[m] = uint8_t(value), highs[m] = uint8_t(value >> 8);
      // Byte i of the two words of 16 rows: of pair i / 64, row i % 64 / 4, column i % 4 / 2; low byte first.
      order[m] = uint8_t(m % 2 * 64 + (m / 64 * 2 + m % 4 / 2) * 16 + m % 64 / 4);
    }
    for (int i = 0; i < 2; i++) {
      low[i] = _mm512_load_si512(lows + 64 * i);
      high[i] = _mm512_load_si512(highs + 64 * i);
      interleave[i] = _mm512_load_si512(order + 64 * i);
    }
  }
  INLINE Raw load(const uint8_t* step, int v) const {
    // Magnitude bits of a negative code are inverted: bit i ^= bit 7, one product with a bit matrix per byte.
    const __m512i invert = _mm512_set1_epi64(0x8182848890a0c080);
    __m512i code = _mm512_loadu_si512(step + cell_offset(v));
    code = _mm512_gf2p8affine_epi64_epi8(code, invert, 0);
    const __m512i lows = _mm512_permutex2var_epi8(low[0], code, low[1]);
    __m512i highs = _mm512_permutex2var_epi8(high[0], code, high[1]);
    highs = _mm512_ternarylogic_epi64(highs, code, _mm512_set1_epi8(-128), 0xf8);  // highs | (code & 0x80)
    return {{_mm512_permutex2var_epi8(lows, interleave[0], highs), _mm512_permutex2var_epi8(lows, interleave[1], highs)}};
  }
  INLINE Floats at(const Raw& raw, int j) const { return _mm512_castsi512_ps(raw.words[j]); }
};

// sum + word . x, two columns
INLINE Floats accumulate(Floats sum, Floats word, const float* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)word, (__m512bh)_mm512_set1_epi32(pair));
}

#else

template <>
struct Unpack<4> {
  static constexpr int kWords = 8;
  typedef Words Raw;
#if LOWBIT_LANES == 16
  static constexpr float kOffset = 0;
  __m512 table;
  INLINE Unpack() { table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }
#else
  // Without a table of 16: a nibble put into the upper mantissa of 16.0 is 16 + q, hence 24 + c. Three instructions that
  // run on three ports; sign extension and conversion would be three for the two ports that FMA needs.
  static constexpr float kOffset = 24;
#endif
  INLINE Raw load(const uint8_t* step, int v) const {
    Raw raw;
    memcpy(&raw, step + v * sizeof(Raw), sizeof(Raw));
    return raw;
  }
  INLINE Floats at(Raw raw, int j) const {
    const int shift = j / 2 * 4 + j % 2 * 16;
#if LOWBIT_LANES == 16
    return _mm512_permutexvar_ps((__m512i)(raw >> shift), table);
#else
    const Words moved = shift < 19 ? raw << (19 - shift) : raw >> (shift - 19);
    return (Floats)((moved & 0x00780000) ^ 0x41c00000);  // 16.0 with its upper mantissa bit set: c + 8 = c ^ 8
#endif
  }
};

template <>
struct Unpack<8> {
  static constexpr int kWords = 4;
  static constexpr float kOffset = 0;
  typedef const uint8_t* Raw;
  INLINE Raw load(const uint8_t* step, int v) const { return step + cell_offset(v) + v * kLanes % 16; }
  INLINE Floats at(Raw raw, int j) const { return from_signed_bytes(raw + 16 * j); }
};

INLINE Floats accumulate(Floats sum, Floats word, const float* x) { return multiply_add(word, broadcast(*x), sum); }

#endif

// A group of a tile: what turns its sums into weights' products.
struct Group {
  float scale[kTile];
  float zero[kTile];  // relative to the unpacked codes
  bool has_zero;
};

inline const uint8_t* group_weights(const Call& call, const Tile& tile, int64_t g) {
  return tile.weights + g * tile_bytes(tile.bits, call.group_size);
}

template <int BITS>
INLINE void load_group(const Call& call, const Tile& tile, int64_t g, Group& group) {
  constexpr float kMiddle = float(1 << (BITS - 1)) - Unpack<BITS>::kOffset;
  group.has_zero = tile.zero_points || Unpack<BITS>::kOffset != 0;
  for (int i = 0; i < kTile; i += kLanes)
    store(group.scale + i, load_as(call.scale_dtype, tile.scales, g * kTile + i));
  if (tile.zero_points)
    for (int i = 0; i < kTile; i += kLanes)
      store(group.zero + i, sub(from_unsigned_bytes(tile.zero_points + g * kTile + i), broadcast(kMiddle)));
  else if (group.has_zero)
    for (int i = 0; i < kTile; i += kLanes) store(group.zero + i, broadcast(Unpack<BITS>::kOffset));
}

// totals[m][row] += scale * (sums - zero * x_sums[m]) for NB vectors of rows from `first`.
template <int MB, int NB>
INLINE void add_group(const Floats (&sums)[NB][MB], const Group& group, const float* x_sums, int first, float* totals) {
  const bool has_zero = group.has_zero;
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++) {
    const int row = (first + b) * kLanes;
    const Floats scale = load(group.scale + row), zero = has_zero ? load(group.zero + row) : zeros();
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) {
      float* total = totals + m * kTile + row;
      const Floats sum = has_zero ? multiply_subtract(zero, broadcast(x_sums[m]), sums[b][m]) : sums[b][m];
      store(total, multiply_add(scale, sum, load(total)));
    }
  }
}

// MB tokens times NB vectors of rows from `first`, straight from the packed codes of a group.
template <int BITS, int MB, int NB>
INLINE void multiply_packed(const Unpack<BITS>& unpack, const uint8_t* weights, int blocks, const float* x,
                            int64_t x_stride, const Group& group, const float* x_sums, int first, float* totals) {
  constexpr int kWords = Unpack<BITS>::kWords;
  Floats sums[NB][MB];
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) sums[b][m] = zeros();
  for (int block = 0; block < blocks; block++, x += x_stride)
#pragma GCC unroll 1
    for (int word = 0; word < kBlockWords; word += kWords, weights += kStep) {
      typename Unpack<BITS>::Raw raw[NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) {
        const uint8_t* cell = weights + cell_offset(first + b);
        _mm_prefetch(reinterpret_cast<const char*>(cell + kPrefetchL2), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(cell + kPrefetchL1), _MM_HINT_T0);
        raw[b] = unpack.load(weights, first + b);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kWords; j++) {
        Floats words[NB];
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) words[b] = unpack.at(raw[b], j);
#pragma GCC unroll 12
        for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
          for (int b = 0; b < NB; b++)
            sums[b][m] = accumulate(sums[b][m], words[b], x + m * kBlockWords + word + j);
      }
    }
  add_group<MB, NB>(sums, group, x_sums, first, totals);
}

// All groups of a tile for MB tokens.
template <int BITS, int MB>
TARGET void multiply_few(const Call& call, const Tile& tile, float* totals) {
  // Accumulators: NB * MB of the 32 (AVX2: 16) registers.
  constexpr int NB = kLanes == 16 ? (MB <= 4 ? 4 : 2) : (MB <= 2 ? 4 : 2);
  const Unpack<BITS> unpack;
  const int blocks = call.group_size / kBlock;
  const int64_t x_stride = MB * kBlockWords, group_bytes = tile_bytes(BITS, call.group_size);
  const uint8_t* weights = tile.weights;
  const float* x = call.x_panel;
  for (int64_t g = 0; g < call.groups(); g++, weights += group_bytes, x += blocks * x_stride) {
    Group group;
    load_group<BITS>(call, tile, g, group);
#pragma GCC unroll 1
    for (int first = 0; first < kVectors; first += NB)
      multiply_packed<BITS, MB, NB>(unpack, weights, blocks, x, x_stride, group, call.x_sums + g * MB, first, totals);
  }
}

// unpacked: [words of the group][kTile]. What will be unpacked next is fetched while this group is multiplied.
template <int BITS>
TARGET void unpack_group(const uint8_t* weights, const uint8_t* next, int words, float* unpacked) {
  constexpr int kWords = Unpack<BITS>::kWords;
  const Unpack<BITS> unpack;
  for (int word = 0; word < words; word += kWords, weights += kStep, next += kStep, unpacked += kWords * kTile)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      _mm_prefetch(reinterpret_cast<const char*>(next + cell_offset(v)), _MM_HINT_T1);
      const auto raw = unpack.load(weights, v);
#pragma GCC unroll 8
      for (int j = 0; j < kWords; j++) store(unpacked + j * kTile + v * kLanes, unpack.at(raw, j));
    }
}

constexpr int kRegisterTokens = 6, kRegisterVectors = kLanes == 16 ? 4 : 2;  // 24 of 32, 12 of 16 registers

// MB tokens times kRegisterVectors vectors of unpacked codes.
template <int MB>
TARGET void multiply_unpacked(const float* unpacked, int blocks, const float* x, int64_t x_stride, const Group& group,
                              const float* x_sums, int first, float* totals) {
  constexpr int NB = kRegisterVectors;
  Floats sums[NB][MB];
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) sums[b][m] = zeros();
  unpacked += first * kLanes;
  for (int block = 0; block < blocks; block++, x += x_stride)
#pragma GCC unroll 4
    for (int word = 0; word < kBlockWords; word++, unpacked += kTile) {
      Floats words[NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) words[b] = load(unpacked + b * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) sums[b][m] = accumulate(sums[b][m], words[b], x + m * kBlockWords + word);
    }
  add_group<MB, NB>(sums, group, x_sums, first, totals);
}

typedef void (*MultiplyUnpacked)(const float*, int, const float*, int64_t, const Group&, const float*, int, float*);
constexpr MultiplyUnpacked kMultiplyUnpacked[kRegisterTokens] = {
    multiply_unpacked<1>, multiply_unpacked<2>, multiply_unpacked<3>,
    multiply_unpacked<4>, multiply_unpacked<5>, multiply_unpacked<6>,
};

// Group g of a tile for all tokens. next: the weights that come after it.
template <int BITS>
TARGET void multiply_many(const Call& call, const Tile& tile, int64_t g, const uint8_t* next, float* unpacked,
                          float* totals) {
  const int blocks = call.group_size / kBlock;
  const int64_t tokens = call.tokens, x_stride = tokens * kBlockWords;
  unpack_group<BITS>(group_weights(call, tile, g), next, blocks * kBlockWords, unpacked);
  Group group;
  load_group<BITS>(call, tile, g, group);
  const float* x = call.x_panel + g * blocks * x_stride;
  const int64_t parts = (tokens + kRegisterTokens - 1) / kRegisterTokens;
  for (int64_t part = 0, first_token = 0; part < parts; part++) {
    const int64_t count = (tokens - first_token + parts - part - 1) / (parts - part);
    for (int first = 0; first < kVectors; first += kRegisterVectors)
      kMultiplyUnpacked[count - 1](unpacked, blocks, x + first_token * kBlockWords, x_stride, group,
                                   call.x_sums + g * tokens + first_token, first, totals + first_token * kTile);
    first_token += count;
  }
}

constexpr int kFewTokens = kLanes == 16 ? 12 : 6;
typedef void (*MultiplyFew)(const Call&, const Tile&, float*);
template <int BITS>
constexpr MultiplyFew kMultiplyFew[12] = {
    multiply_few<BITS, 1>, multiply_few<BITS, 2>, multiply_few<BITS, 3>, multiply_few<BITS, 4>,
    multiply_few<BITS, 5>, multiply_few<BITS, 6>,
#if LOWBIT_LANES == 16
    multiply_few<BITS, 7>, multiply_few<BITS, 8>, multiply_few<BITS, 9>, multiply_few<BITS, 10>,
    multiply_few<BITS, 11>, multiply_few<BITS, 12>,
#endif
};

// y = totals + bias, rounded, for the rows of a tile.
TARGET void store_tile(const Call& call, const Tile& tile, const float* totals) {
  const int64_t size = element_size(call.x_dtype);
  uint8_t bias[kTile * 4] = {}, ragged[kTile * 4];
  if (call.bias) memcpy(bias, call.bias + tile.first * size, size_t(tile.rows * size));
  for (int64_t m = 0; m < call.tokens; m++, totals += kTile) {
    uint8_t* y = call.y + (m * call.y_stride + tile.first) * size;
    uint8_t* out = tile.rows == kTile ? y : ragged;
    for (int i = 0; i < kTile; i += kLanes) {
      Floats v = load(totals + i);
      if (call.bias) v = add(v, load_as(call.x_dtype, bias, i));
      store_as(call.x_dtype, out, i, v);
    }
    if (out == ragged) memcpy(y, ragged, size_t(tile.rows * size));
  }
}

// Item of lowbit_linear: some tiles for all tokens. scratch: an unpacked group, then totals [tiles][tokens][kTile].
TARGET void multiply(const Call& call, int64_t item, uint8_t* scratch) {
  float* unpacked = reinterpret_cast<float*>(scratch);
  float* totals = unpacked + kMaxGroup * kTile;
  const int64_t begin = item * call.item_tiles, left = call.tiles - begin, size = call.tokens * kTile;
  const int count = int(left < call.item_tiles ? left : call.item_tiles);
  Tile tiles[kMaxItem];
  for (int t = 0; t < count; t++) tiles[t] = call.tile(begin + t);
  memset(totals, 0, size_t(count * size * 4));
  if (call.tokens <= kFewTokens) {
    for (int t = 0; t < count; t++) {
      const MultiplyFew function = (tiles[t].bits == 4 ? kMultiplyFew<4> : kMultiplyFew<8>)[call.tokens - 1];
      function(call, tiles[t], totals + t * size);
    }
  } else {
    for (int64_t g = 0; g < call.groups(); g++)
      for (int t = 0; t < count; t++) {
        const uint8_t* next = t + 1 < count ? group_weights(call, tiles[t + 1], g) : group_weights(call, tiles[0], g + 1);
        if (tiles[t].bits == 4) multiply_many<4>(call, tiles[t], g, next, unpacked, totals + t * size);
        else multiply_many<8>(call, tiles[t], g, next, unpacked, totals + t * size);
      }
  }
  for (int t = 0; t < count; t++) store_tile(call, tiles[t], totals + t * size);
}

// One token of x into the panel, and its sums per group.
TARGET void pack_x(const Call& call, int64_t token, uint8_t*) {
  const uint8_t* x = call.x + token * call.columns * element_size(call.x_dtype);
  float* out = call.x_panel + token * kBlockWords;
  const int group_blocks = call.group_size / kBlock;
  Floats sum = zeros();
  for (int64_t block = 0; block < call.columns / kBlock; block++, out += call.tokens * kBlockWords) {
#if LOWBIT_DOT
    memcpy(out, x + block * kBlock * 2, kBlock * 2);
#endif
    for (int i = 0; i < kBlock; i += kLanes) {
      const Floats v = load_as(call.x_dtype, x, block * kBlock + i);
#if !LOWBIT_DOT
      store(out + i, v);
#endif
      sum = add(sum, v);
    }
    if ((block + 1) % group_blocks == 0) {
      float lanes[kLanes], total = 0;
      store(lanes, sum);
      for (float lane : lanes) total += lane;
      call.x_sums[block / group_blocks * call.tokens + token] = total;
      sum = zeros();
    }
  }
}

#if !LOWBIT_DOT

template <int BITS>
TARGET void dequantize_tile(const Call& call, const Tile& tile, float* unpacked) {
  for (int64_t g = 0; g < call.groups(); g++) {
    unpack_group<BITS>(group_weights(call, tile, g), group_weights(call, tile, g + 1), call.group_size, unpacked);
    Group group;
    load_group<BITS>(call, tile, g, group);
    for (int k = 0; k < call.group_size; k++) {
      const int64_t row = (g * call.group_size + k) * call.y_stride + tile.first;
      for (int i = 0; i < kTile; i += kLanes) {
        Floats v = load(unpacked + k * kTile + i);
        if (group.has_zero) v = sub(v, load(group.zero + i));
        store_as(call.x_dtype, call.y, row + i, mul(v, load(group.scale + i)));
      }
    }
  }
}

// Item of lowbit_dequantize: a tile.
TARGET void dequantize(const Call& call, int64_t item, uint8_t* scratch) {
  const Tile tile = call.tile(item);
  if (tile.bits == 4) dequantize_tile<4>(call, tile, reinterpret_cast<float*>(scratch));
  else dequantize_tile<8>(call, tile, reinterpret_cast<float*>(scratch));
}

#endif

#undef INLINE

}  // namespace LOWBIT_NAMESPACE

#undef LOWBIT_NAMESPACE
#undef LOWBIT_LANES
#undef LOWBIT_DOT
#undef TARGET
