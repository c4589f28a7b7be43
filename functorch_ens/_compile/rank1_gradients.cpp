// For every member e:  M_e = g_e^T x,  dW += M_e * s_e,  ds_e = sum_o W * M_e.
//
// A tile of M_e, ROWS outputs by WIDTH inputs, stays in half of the registers from its product to both sums.
#include <torch/csrc/inductor/cpp_prefix.h>

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t ROWS = 8, COLUMNS = 2, WIDTH = COLUMNS * LANES;

#define EACH(i, n) _Pragma("GCC unroll 16") for (int64_t i = 0; i < n; ++i)

extern "C" void kernel(
    const float* g,  // [E, B, O]
    const float* x,  // [B, I]
    const float* s,  // [E, I]
    const float* W,  // [O, I]
    float* dW,
    float* ds,
    int64_t E,
    int64_t B,
    int64_t O,
    int64_t I,
    int64_t threads) {
    // Packed as they are read, with zeros beyond the end: rows far apart would share few lines of the cache.
    const int64_t tiles = (O + ROWS - 1) / ROWS;
    std::vector<float> packed_g(tiles * E * B * ROWS);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t row = 0; row < E * B; ++row)
                EACH(r, ROWS) {
                    const int64_t o = tile * ROWS + r;
                    packed_g[(tile * E * B + row) * ROWS + r] = o < O ? g[row * O + o] : 0.0f;
                }

        std::vector<float> packed_x(B * WIDTH);
        #pragma omp for
        for (int64_t i = 0; i < I; i += WIDTH) {
            const int64_t width = std::min(WIDTH, I - i);
            for (int64_t b = 0; b < B; ++b)
                for (int64_t j = 0; j < WIDTH; ++j)
                    packed_x[b * WIDTH + j] = j < width ? x[b * I + i + j] : 0.0f;
            auto load = [&](const float* row, int64_t c) {
                const int64_t left = width - c * LANES;
                const float* from = row + i + c * LANES;
                return left >= LANES ? Vec::loadu(from) : left > 0 ? Vec::loadu(from, left) : Vec(0);
            };
            auto store = [&](Vec value, float* row, int64_t c) {
                const int64_t left = width - c * LANES;
                float* to = row + i + c * LANES;
                if (left >= LANES) value.store(to);
                else if (left > 0) value.store(to, left);
            };

            for (int64_t e = 0; e < E; ++e) std::fill_n(ds + e * I + i, width, 0.0f);
            const float* g_row = packed_g.data();
            for (int64_t o = 0; o < O; o += ROWS) {
                Vec sum_W[ROWS][COLUMNS];
                EACH(r, ROWS) EACH(c, COLUMNS) sum_W[r][c] = Vec(0);
                for (int64_t e = 0; e < E; ++e) {
                    Vec M[ROWS][COLUMNS];
                    EACH(r, ROWS) EACH(c, COLUMNS) M[r][c] = Vec(0);
                    const float* x_row = packed_x.data();
                    for (int64_t b = 0; b < B; ++b, g_row += ROWS, x_row += WIDTH) {
                        Vec x_b[COLUMNS];
                        EACH(c, COLUMNS) x_b[c] = Vec::loadu(x_row + c * LANES);
                        EACH(r, ROWS) EACH(c, COLUMNS) M[r][c] = at::vec::fmadd(Vec(g_row[r]), x_b[c], M[r][c]);
                    }
                    EACH(c, COLUMNS) {
                        const Vec s_e = load(s + e * I, c);
                        Vec sum_s = load(ds + e * I, c);
                        EACH(r, ROWS) {
                            sum_W[r][c] = at::vec::fmadd(M[r][c], s_e, sum_W[r][c]);
                            if (o + r < O) sum_s = at::vec::fmadd(M[r][c], load(W + (o + r) * I, c), sum_s);
                        }
                        store(sum_s, ds + e * I, c);
                    }
                }
                EACH(r, ROWS) if (o + r < O) EACH(c, COLUMNS) store(sum_W[r][c], dW + (o + r) * I, c);
            }
        }
    }
}
