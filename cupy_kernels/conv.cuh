// Binary convolution but for the counting, which differs between conv_popc.cu and conv_bmma.cu.
//
// With P = popcount(window & filter), summed over the taps inside the image,
//
//     D = 4 P - 2 popcount(window) - 2 popcount(filter) + channels,   all over those taps only
//
// Words outside the image are 0, so they add nothing to P. popcount(window) is a sum of the packed pixels'
// counts. The rest depends on the filter and on which taps are inside: a table over the few classes of that.
// Of several activation planes each has its D_i, and D = D_1 + g_1 D_2 + g_2 D_3.
//
//     y = D . K . alpha + bias + |s| P(I)          K = sum over the taps inside of k . A
//
// then, where present: y + offset, y + residual. Absent parts are null.

struct ConvArgs {
  const Word* words;              // [images, height, width, PLANES, words of a pixel]
  const int* counts;              // [images, height, width, PLANES]: bits that are 1
  const float* magnitudes;        // A [images, height, width]; null: no K
  const Word* weights;            // [out_channels, rows * columns, words of a pixel]
  const int* corrections;         // [row classes * column_classes, out_channels]
  const int* row_class;           // [out_height]: class by the kernel's rows inside; null: all, everywhere
  const int* column_class;        // [out_width], null with row_class
  const float* scale_filter;      // k [rows, columns]
  const float* weight_scale;      // alpha [out_channels]
  const float* bias;              // [out_channels]
  const Activation* shortcut;     // I, at the output's pixels [images, out_height, out_width, shortcut_channels]
  const Activation* offset;       // [images of image_pixels, out_channels], such as the time projection
  const Activation* residual;     // [images, out_height, out_width, out_channels]
  Activation* out;                // y [images, out_height, out_width, out_channels]
  int* integers;                  // D of one plane instead of y, in the same shape; null: y
  float shortcut_scale;           // |s|
  int word_count;                 // of a pixel and plane
  int images;
  int height;
  int width;
  int out_height;
  int out_width;
  int out_channels;
  int rows;                       // of the kernel
  int columns;
  int stride_y;
  int stride_x;
  int top;                        // padding
  int left;
  int column_classes;
  int shortcut_channels;
  int paired;                     // 1: out_channels and shortcut_channels are even
  int image_pixels;               // output pixels per offset
  int tile_images;                // conv_bmma: output pixels of a tile, images x rows x columns
  int tile_rows;
  int tile_columns;
  float plane_scale_1;            // g_1
  float plane_scale_2;
};

// Terms of the epilogue for an output pixel, the same for all channels.
struct __align__(16) PixelTerms {
  int pixel;          // index of the output pixel; -1: none, the tile reaches over the edge
  int ones[PLANES];   // popcount(window)
  int border;         // row of `corrections`
  float scale;        // K
};

// KNOWN_ROWS and KNOWN_COLUMNS of the kernel; 0: as `args` says. If known, all loads are under way at once.
template <int KNOWN_ROWS, int KNOWN_COLUMNS>
__device__ inline PixelTerms pixel_terms(const ConvArgs& args, int image, int y, int x) {
  const int rows = KNOWN_ROWS ? KNOWN_ROWS : args.rows;
  const int columns = KNOWN_COLUMNS ? KNOWN_COLUMNS : args.columns;
  PixelTerms terms = {-1, {}, 0, 0.0f};
  if (image >= args.images || y >= args.out_height || x >= args.out_width) return terms;
  terms.pixel = (image * args.out_height + y) * args.out_width + x;
  if (args.row_class) terms.border = args.row_class[y] * args.column_classes + args.column_class[x];
#pragma unroll
  for (int row = 0; row < rows; row++) {
    int source_y = y * args.stride_y - args.top + row;
#pragma unroll
    for (int column = 0; column < columns; column++) {
      int source_x = x * args.stride_x - args.left + column;
      bool inside = source_y >= 0 && source_y < args.height && source_x >= 0 && source_x < args.width;
      int source = (image * args.height + source_y) * args.width + source_x;
#pragma unroll
      for (int plane = 0; plane < PLANES; plane++)
        terms.ones[plane] += inside ? args.counts[source * PLANES + plane] : 0;
      if (args.magnitudes && inside) {
        float part = __fmul_rn(args.magnitudes[source], args.scale_filter[row * columns + column]);
        terms.scale = __fadd_rn(terms.scale, part);
      }
    }
  }
  return terms;
}

// D of one plane.
__device__ __forceinline__ int dot(
    const ConvArgs& args, const PixelTerms& terms, int plane, int channel, int matches) {
  int correction = args.corrections[(size_t)terms.border * args.out_channels + channel];
  return 4 * matches - 2 * terms.ones[plane] + correction;
}

// Content of a tile's shared memory per output: of one plane its popcount; of several D, as a float's bits.
__device__ __forceinline__ int staged(
    const ConvArgs& args, const PixelTerms& terms, int channel, const int (&matches)[PLANES]) {
  if (PLANES == 1) return matches[0];
  if (channel >= args.out_channels) return 0;
  const float scales[2] = {args.plane_scale_1, args.plane_scale_2};
  float total = __int2float_rn(dot(args, terms, 0, channel, matches[0]));
#pragma unroll
  for (int plane = 1; plane < PLANES; plane++) {
    float next = __int2float_rn(dot(args, terms, plane, channel, matches[plane]));
    total = __fadd_rn(total, __fmul_rn(scales[plane - 1], next));
  }
  return __float_as_int(total);
}

__device__ __forceinline__ float product(
    const ConvArgs& args, const PixelTerms& terms, int channel, int staged) {
  return PLANES == 1 ? __int2float_rn(dot(args, terms, 0, channel, staged)) : __int_as_float(staged);
}

// Shortcut and residual of two neighbouring output channels, so that several pairs can be read at once.
struct Gathered {
  float2 shortcut[2], residual;
};

__device__ __forceinline__ Gathered gather(const ConvArgs& args, int pixel, int channel) {
  Gathered found = {};
  bool second = channel + 1 < args.out_channels;
  size_t place = (size_t)pixel * args.out_channels + channel;
  if (args.shortcut) {
    int from = channel % args.shortcut_channels;
    const Activation* source = args.shortcut + (size_t)pixel * args.shortcut_channels;
    // Odd widths: the second channel may be the first one again, or lie beyond the pixel's last.
    bool next = second && from + 1 < args.shortcut_channels;
    found.shortcut[0] = load_two(source + from, args.paired, next);
    if (second && !next) found.shortcut[0].y = to_float(source[0]);
    int more = from + args.out_channels;
    if (more < args.shortcut_channels)
      found.shortcut[1] = load_two(source + more, args.paired, second && more + 1 < args.shortcut_channels);
  }
  if (args.residual) found.residual = load_two(args.residual + place, args.paired, second);
  return found;
}

// P(I) of one channel: the mean of the input channels that equal it modulo the output's number of channels; with
// fewer input channels they repeat. `first` and `second` are the first two.
__device__ __forceinline__ float tiled(
    const ConvArgs& args, int pixel, int channel, float first, float second) {
  if (args.shortcut_channels <= args.out_channels) return first;
  const Activation* source = args.shortcut + (size_t)pixel * args.shortcut_channels;
  float total = first;
  int count = 1;
  for (int c = channel + args.out_channels; c < args.shortcut_channels; c += args.out_channels, count++)
    total = __fadd_rn(total, count == 1 ? second : to_float(source[c]));
  return __fdiv_rn(total, (float)count);
}

// Every operation is rounded on its own, in the order of the formula above.
__device__ __forceinline__ float epilogue(
    const ConvArgs& args, const PixelTerms& terms, int channel, int staged, float shortcut, float residual) {
  float y = product(args, terms, channel, staged);
  int image = terms.pixel / args.image_pixels;
  if (args.magnitudes) y = __fmul_rn(y, terms.scale);
  if (args.weight_scale) y = __fmul_rn(y, args.weight_scale[channel]);
  if (args.bias) y = __fadd_rn(y, args.bias[channel]);
  if (args.shortcut) y = __fadd_rn(y, __fmul_rn(args.shortcut_scale, shortcut));
  if (args.offset) y = __fadd_rn(y, to_float(args.offset[image * args.out_channels + channel]));
  if (args.residual) y = __fadd_rn(y, residual);
  return y;
}

__device__ __forceinline__ void finish(
    const ConvArgs& args, const PixelTerms& terms, int channel, int2 staged, const Gathered& found) {
  bool second = channel + 1 < args.out_channels;
  size_t place = (size_t)terms.pixel * args.out_channels + channel;
  if (PLANES == 1 && args.integers) {
    args.integers[place] = dot(args, terms, 0, channel, staged.x);
    if (second) args.integers[place + 1] = dot(args, terms, 0, channel + 1, staged.y);
    return;
  }
  float2 shortcut = found.shortcut[0], y = {};
  if (args.shortcut) {
    shortcut.x = tiled(args, terms.pixel, channel, shortcut.x, found.shortcut[1].x);
    if (second) shortcut.y = tiled(args, terms.pixel, channel + 1, shortcut.y, found.shortcut[1].y);
  }
  y.x = epilogue(args, terms, channel, staged.x, shortcut.x, found.residual.x);
  if (second) y.y = epilogue(args, terms, channel + 1, staged.y, shortcut.y, found.residual.y);
  store_two(args.out + place, y, args.paired, second);
}

#define GATHER 4   // pixels whose reads a thread has under way at once

// Outputs of a tile from what is `staged` in shared memory, [pixels][stride] of which the first `filters` (even, at
// most twice the workers) count. A worker keeps its pair of channels, and goes through the pixels by `step`.
__device__ __forceinline__ void finish_tile(
    const ConvArgs& args, const PixelTerms* terms, const int* staged, int stride, int pixels, int filters,
    int first_filter, int worker, int workers) {
  int pairs = filters / 2, column = worker % pairs * 2, channel = first_filter + column;
  int step = workers / pairs, first = worker / pairs;
  if (first >= step || channel >= args.out_channels) return;
#pragma unroll 1
  for (int start = first; start < pixels; start += GATHER * step) {
    Gathered found[GATHER];
#pragma unroll
    for (int i = 0; i < GATHER; i++) {
      int p = start + i * step;
      if (p < pixels && terms[p].pixel >= 0) found[i] = gather(args, terms[p].pixel, channel);
    }
#pragma unroll
    for (int i = 0; i < GATHER; i++) {
      int p = start + i * step;
      if (p >= pixels || terms[p].pixel < 0) continue;
      finish(args, terms[p], channel, *reinterpret_cast<const int2*>(staged + p * stride + column), found[i]);
    }
  }
}
