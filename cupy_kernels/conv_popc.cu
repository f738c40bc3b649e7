// Binary convolution on CUDA cores: a matrix product over words, 64 pixels x 64 filters per block, 4 x 4 per thread.
// For any geometry and any GPU from sm_75; popcounts are its limit, 16 per clock and multiprocessor. All planes of an
// activation meet a filter's word while it is in a register.
#include "device.cuh"
#include "conv.cuh"

#define PIXELS 64
#define FILTERS 64
#define DEPTH 16                // words of the window at a time
#define STRIDE (PIXELS + 4)     // spreads the transposed stores over the banks

// The words of a window, one after another: word `k` of the window whose corner is (image, y, x), of a plane.
__device__ __forceinline__ Word window_word(const ConvArgs& args, int image, int y, int x, int plane, int k) {
  int tap = k / args.word_count, word = k % args.word_count;
  y += tap / args.columns, x += tap % args.columns;
  if (image >= args.images || y < 0 || y >= args.height || x < 0 || x >= args.width) return 0;
  size_t pixel = (size_t)(image * args.height + y) * args.width + x;
  return args.words[(pixel * PLANES + plane) * args.word_count + word];
}

// Grid (tiles of pixels, tiles of filters), 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) conv_popc(ConvArgs args) {
  SHARED_MEMORY(memory);
  Word* pixel_words = reinterpret_cast<Word*>(memory);                            // [PLANES][DEPTH][STRIDE]
  Word* filter_words = pixel_words + PLANES * DEPTH * STRIDE;                     // [DEPTH][STRIDE]
  PixelTerms* terms = reinterpret_cast<PixelTerms*>(filter_words + DEPTH * STRIDE);   // [PIXELS]
  int* outputs = reinterpret_cast<int*>(terms + PIXELS);                          // staged [PIXELS][FILTERS]
  int first_pixel = blockIdx.x * PIXELS, first_filter = blockIdx.y * FILTERS;
  int depth = args.rows * args.columns * args.word_count;

  // Each thread loads word `own % DEPTH` of four pixels and four filters: neighbours read neighbouring words.
  int own = threadIdx.x, k_own = own % DEPTH;
  int image[4], y[4], x[4];
  for (int i = 0; i < 4; i++) {
    int pixel = first_pixel + own / DEPTH + i * 16, line = pixel / args.out_width;
    image[i] = line / args.out_height;
    y[i] = line % args.out_height * args.stride_y - args.top;
    x[i] = pixel % args.out_width * args.stride_x - args.left;
  }
  if (own < PIXELS) {
    int pixel = first_pixel + own, line = pixel / args.out_width;
    terms[own] =
        pixel_terms<0, 0>(args, line / args.out_height, line % args.out_height, pixel % args.out_width);
  }

  int matches[4][4][PLANES] = {};
  int group = threadIdx.x / 16, lane = threadIdx.x % 16;   // of pixels, of filters
  for (int start = 0; start < depth; start += DEPTH) {
    int k = start + k_own;
    for (int i = 0; i < 4; i++) {
      int place = own / DEPTH + i * 16, filter = first_filter + place;
      bool exists = k < depth;
#pragma unroll
      for (int plane = 0; plane < PLANES; plane++)
        pixel_words[(plane * DEPTH + k_own) * STRIDE + place] =
            exists ? window_word(args, image[i], y[i], x[i], plane, k) : 0;
      filter_words[k_own * STRIDE + place] =
          exists && filter < args.out_channels ? args.weights[(size_t)filter * depth + k] : 0;
    }
    __syncthreads();  // the words are there
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      uint4 b = *reinterpret_cast<const uint4*>(filter_words + j * STRIDE + 4 * lane);
      Word filter[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int plane = 0; plane < PLANES; plane++) {
        uint4 a = *reinterpret_cast<const uint4*>(pixel_words + (plane * DEPTH + j) * STRIDE + 4 * group);
        Word pixel[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int p = 0; p < 4; p++)
#pragma unroll
          for (int f = 0; f < 4; f++) matches[p][f][plane] += __popc(pixel[p] & filter[f]);
      }
    }
    __syncthreads();  // and may be replaced
  }

#pragma unroll
  for (int p = 0; p < 4; p++) {
    int row = 4 * group + p, four[4];
#pragma unroll
    for (int f = 0; f < 4; f++)
      four[f] = staged(args, terms[row], first_filter + 4 * lane + f, matches[p][f]);
    *reinterpret_cast<int4*>(outputs + row * FILTERS + 4 * lane) = make_int4(four[0], four[1], four[2], four[3]);
  }
  __syncthreads();  // all outputs are there
  finish_tile(args, terms, outputs, FILTERS, PIXELS, FILTERS, first_filter, threadIdx.x, blockDim.x);
}
