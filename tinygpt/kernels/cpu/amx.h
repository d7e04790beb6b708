/* Intel AMX: eight tile registers of 16 rows of 64 bytes. TILE_DOT(c, a, b) adds to the float32
 * tile c (16 x 16) the product of the bfloat16 tiles a (16 x 32) and b, whose row k holds the
 * pairs b[2k][n], b[2k + 1][n]. With AMX_EMULATED 1 the same in plain C, for processors that have
 * no AMX to be tested on. */
#if AMX_EMULATED
typedef struct { unsigned bytes4[16][16]; } tile_t;

HOT void tile_load(tile_t* t, const void* p, long stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) t->bytes4[i][j] = ((const unsigned*)((const char*)p + i * stride))[j];
}
HOT void tile_store(const tile_t* t, void* p, long stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) ((unsigned*)((char*)p + i * stride))[j] = t->bytes4[i][j];
}
HOT void tile_dot(tile_t* c, const tile_t* a, const tile_t* b) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      float sum = __builtin_bit_cast(float, c->bytes4[i][j]);
      for (int k = 0; k < 16; k++) {
        const unsigned x = a->bytes4[i][k], y = b->bytes4[k][j];
        sum += __builtin_bit_cast(float, x << 16) * __builtin_bit_cast(float, y << 16);
        sum += __builtin_bit_cast(float, x & 0xffff0000u) * __builtin_bit_cast(float, y & 0xffff0000u);
      }
      c->bytes4[i][j] = __builtin_bit_cast(unsigned, sum);
    }
}

#define TILES_BEGIN tile_t tiles[8];
#define TILES_END
#define TILE_ZERO(t) for (int i = 0; i < 256; i++) tiles[t].bytes4[i / 16][i % 16] = 0
#define TILE_LOAD(t, p, stride) tile_load(&tiles[t], p, stride)
#define TILE_STORE(t, p, stride) tile_store(&tiles[t], p, stride)
#define TILE_DOT(c, a, b) tile_dot(&tiles[c], &tiles[a], &tiles[b])
#else
#define TILES_BEGIN \
  struct { unsigned char palette, start, zero[14]; unsigned short bytes[16]; unsigned char rows[16]; } \
      config __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, \
                                             {16, 16, 16, 16, 16, 16, 16, 16}}; \
  __builtin_ia32_tile_loadconfig(&config);
#define TILES_END __builtin_ia32_tilerelease();
#define TILE_ZERO(t) __builtin_ia32_tilezero(t)
#define TILE_LOAD(t, p, stride) __builtin_ia32_tileloadd64(t, (const void*)(p), (u64)(stride))
#define TILE_STORE(t, p, stride) __builtin_ia32_tilestored64(t, (void*)(p), (u64)(stride))
#define TILE_DOT(c, a, b) __builtin_ia32_tdpbf16ps(c, a, b)
#endif
