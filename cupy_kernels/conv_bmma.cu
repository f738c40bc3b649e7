// Binary convolution on binary tensor cores: an implicit matrix product, weights stationary.
//
// A block of 8 warps keeps its filters in shared memory and walks over tiles of 128 output pixels, whose words
// come in once, with the halo around them. Rows of the product are output pixels, columns are filters, and the
// depth runs over taps, then words of a tap, padded to 256 bits only at its end.
//
// Compiled for one kind of layer: WORDS of a pixel, ROWS and COLUMNS of the kernel, and the shape of the warps'
// tiles: WARPS side by side in the filters' direction, each with FILTER_TILES times 8 filters. The other 8 / WARPS
// divide the 128 pixels. A pixel's words are those of all its planes, which meet a filter's words while these are in
// registers.
#include "device.cuh"
#include "conv.cuh"

#define PIXELS 128
#define FILTERS (8 * FILTER_TILES * WARPS)
#define PIXEL_TILES WARPS                  // of 16 pixels per warp: 128 / (8 / WARPS) / 16
#define DEPTH (ROWS * COLUMNS * WORDS)
#define STEPS ((DEPTH + 7) / 8)            // of 256 bits
// Strides of 4 modulo 8 words let the 8 rows x 4 words of a fragment come from 32 different banks.
#define PIXEL_WORDS (PLANES * WORDS)
#define PIXEL_STRIDE ((PIXEL_WORDS + 3) / 8 * 8 + 4)
#define FILTER_STRIDE (STEPS * 8 + 4)
// And a stride of 8 or 24 modulo 32 lets the 4 rows x 4 pairs of half a warp's outputs go to 32 different banks.
#define OUTPUT_STRIDE (8 * FILTER_TILES + (FILTER_TILES % 2 ? 0 : 8))

struct Tile {
  int image, y, x;   // of its first output pixel
};

__device__ __forceinline__ Tile tile_at(const ConvArgs& args, int index) {
  int across = (args.out_width + args.tile_columns - 1) / args.tile_columns;
  int down = (args.out_height + args.tile_rows - 1) / args.tile_rows;
  return {index / (across * down) * args.tile_images, index / across % down * args.tile_rows,
          index % across * args.tile_columns};
}

// Lines and columns of input pixels under a tile, its halo included.
__device__ __forceinline__ int halo_rows(const ConvArgs& args) {
  return (args.tile_rows - 1) * args.stride_y + ROWS;
}
__device__ __forceinline__ int halo_columns(const ConvArgs& args) {
  return (args.tile_columns - 1) * args.stride_x + COLUMNS;
}

__device__ inline void load_filters(const ConvArgs& args, Word* filters) {
  for (int i = threadIdx.x; i < FILTERS * STEPS * 8; i += blockDim.x) {
    int k = i % (STEPS * 8), row = i / (STEPS * 8), filter = blockIdx.y * FILTERS + row;
    bool exists = k < DEPTH && filter < args.out_channels;
    filters[row * FILTER_STRIDE + k] = exists ? args.weights[(size_t)filter * DEPTH + k] : 0;
  }
}

// Offset of word k of a window and its first plane from the window's corner. Beyond the depth the filters are 0: anything does.
__device__ inline void load_offsets(const ConvArgs& args, int* offsets) {
  for (int k = threadIdx.x; k < STEPS * 8; k += blockDim.x) {
    int tap = k / WORDS, y = tap / COLUMNS, x = tap % COLUMNS;
    offsets[k] = k < DEPTH ? (y * halo_columns(args) + x) * PIXEL_STRIDE + k % WORDS : 0;
  }
}

// Position of a pixel under the tile from its first one, image << 24 | y << 12 | x: the same for every tile.
__device__ inline void load_places(const ConvArgs& args, int* places) {
  int columns = halo_columns(args), size = halo_rows(args) * columns;
  for (int i = threadIdx.x; i < args.tile_images * size; i += blockDim.x)
    places[i] = i / size << 24 | i % size / columns << 12 | i % columns;
}

// Four threads per pixel: their stores go to different banks.
__device__ inline void load_pixels(const ConvArgs& args, Tile tile, const int* places, Word* pixels) {
  int count = args.tile_images * halo_rows(args) * halo_columns(args);
  int top = tile.y * args.stride_y - args.top, left = tile.x * args.stride_x - args.left;
  for (int pixel = threadIdx.x / 4; pixel < count; pixel += blockDim.x / 4) {
    int image = tile.image + (places[pixel] >> 24);
    int y = top + (places[pixel] >> 12 & 0xfff), x = left + (places[pixel] & 0xfff);
    bool inside = image < args.images && y >= 0 && y < args.height && x >= 0 && x < args.width;
    const Word* source = args.words + ((size_t)(image * args.height + y) * args.width + x) * PIXEL_WORDS;
#pragma unroll
    for (int i = 0; i < (PIXEL_WORDS + 3) / 4; i++) {
      int word = 4 * i + threadIdx.x % 4;
      if (word < PIXEL_WORDS) pixels[pixel * PIXEL_STRIDE + word] = inside ? source[word] : 0;
    }
  }
}

__device__ inline void load_terms(const ConvArgs& args, Tile tile, PixelTerms* terms) {
  for (int p = threadIdx.x; p < PIXELS; p += blockDim.x) {
    int x = p % args.tile_columns, line = p / args.tile_columns;
    int y = line % args.tile_rows, image = line / args.tile_rows;
    // A tile of fewer than 128 pixels has images beyond its own; they count as missing.
    int source = image < args.tile_images ? tile.image + image : args.images;
    terms[p] = pixel_terms<ROWS, COLUMNS>(args, source, tile.y + y, tile.x + x);
  }
}

// Grid (persistent blocks, slices of FILTERS), 256 threads.
extern "C" __global__ void __launch_bounds__(256, PLANES * WARPS > 2 ? 1 : 2) conv_bmma(ConvArgs args) {
  SHARED_MEMORY(memory);
  PixelTerms* terms = reinterpret_cast<PixelTerms*>(memory);       // [PIXELS]
  int* offsets = reinterpret_cast<int*>(terms + PIXELS);           // [STEPS * 8]
  int* outputs = offsets + STEPS * 8;                              // staged [8 warps][16][OUTPUT_STRIDE]
  Word* filters = reinterpret_cast<Word*>(outputs + 8 * 16 * OUTPUT_STRIDE);   // [FILTERS][FILTER_STRIDE]
  int* places = reinterpret_cast<int*>(filters + FILTERS * FILTER_STRIDE);   // [images, halo rows, halo columns]
  // [images, halo rows, halo columns][PIXEL_STRIDE]
  Word* pixels = reinterpret_cast<Word*>(places + args.tile_images * halo_rows(args) * halo_columns(args));
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;         // as in bmma
  int warp = threadIdx.x / 32, first_pixel = warp / WARPS * 16 * PIXEL_TILES;
  int first_filter = warp % WARPS * 8 * FILTER_TILES;              // of the block's
  int layer_filter = blockIdx.y * FILTERS + first_filter;          // of the layer's

  // Corners of the windows of this lane's rows, in `pixels`. Rows beyond the tile's own stay at its start.
  int corners[PIXEL_TILES][2];
#pragma unroll
  for (int m = 0; m < PIXEL_TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int p = first_pixel + 16 * m + 8 * half + g;
      int x = p % args.tile_columns, line = p / args.tile_columns;
      int y = line % args.tile_rows, image = line / args.tile_rows;
      int corner = (image * halo_rows(args) + y * args.stride_y) * halo_columns(args) + x * args.stride_x;
      corners[m][half] = image < args.tile_images ? corner * PIXEL_STRIDE : 0;
    }
  }

  load_filters(args, filters);
  load_offsets(args, offsets);
  load_places(args, places);
  int tiles = (args.images + args.tile_images - 1) / args.tile_images *
              ((args.out_height + args.tile_rows - 1) / args.tile_rows) *
              ((args.out_width + args.tile_columns - 1) / args.tile_columns);
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    Tile tile = tile_at(args, index);
    __syncthreads();  // all warps are done with the tile before
    load_pixels(args, tile, places, pixels);
    load_terms(args, tile, terms);
    __syncthreads();  // this one is there

    int matches[PLANES][PIXEL_TILES][FILTER_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
      int low = offsets[8 * step + t], high = offsets[8 * step + t + 4];
      Word a[PLANES][PIXEL_TILES][4];
#pragma unroll
      for (int plane = 0; plane < PLANES; plane++) {
#pragma unroll
        for (int m = 0; m < PIXEL_TILES; m++) {
          const Word* first = pixels + plane * WORDS;
          a[plane][m][0] = first[corners[m][0] + low];
          a[plane][m][1] = first[corners[m][1] + low];
          a[plane][m][2] = first[corners[m][0] + high];
          a[plane][m][3] = first[corners[m][1] + high];
        }
      }
      const Word* column = filters + (first_filter + g) * FILTER_STRIDE + 8 * step + t;
#pragma unroll
      for (int n = 0; n < FILTER_TILES; n++) {
        Word b[2] = {column[8 * n * FILTER_STRIDE], column[8 * n * FILTER_STRIDE + 4]};
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) {
#pragma unroll
          for (int m = 0; m < PIXEL_TILES; m++) bmma(matches[plane][m][n], a[plane][m], b);
        }
      }
    }

    int* own = outputs + warp * 16 * OUTPUT_STRIDE;
#pragma unroll
    for (int m = 0; m < PIXEL_TILES; m++) {
      const PixelTerms* own_terms = terms + first_pixel + 16 * m;
      PixelTerms rows[2] = {own_terms[g], own_terms[g + 8]};
#pragma unroll
      for (int n = 0; n < FILTER_TILES; n++) {
        int d[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int of_planes[PLANES];
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++) of_planes[plane] = matches[plane][m][n][e];
          d[e] = staged(args, rows[e / 2], layer_filter + 8 * n + 2 * t + e % 2, of_planes);
        }
        *reinterpret_cast<int2*>(own + g * OUTPUT_STRIDE + 8 * n + 2 * t) = make_int2(d[0], d[1]);
        *reinterpret_cast<int2*>(own + (g + 8) * OUTPUT_STRIDE + 8 * n + 2 * t) = make_int2(d[2], d[3]);
      }
      __syncwarp();  // the outputs of 16 pixels are there
      finish_tile(args, own_terms, own, OUTPUT_STRIDE, 16, 8 * FILTER_TILES, layer_filter, lane, 32);
      __syncwarp();  // and may be replaced
    }
  }
}
