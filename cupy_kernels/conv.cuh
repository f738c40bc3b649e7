// A binary convolution, but for the counting, which the tiers conv_popc.cu and conv_bmma.cu do each in its way.
//
// With P = popcount(window & filter), summed over the taps inside the image,
//
//     D = 4 P - 2 popcount(window) - 2 popcount(filter) + channels,   all over those taps only
//
// Words outside the image are 0, so they add nothing to P. popcount(window) is a sum of the packed pixels'
// counts. The rest depends on the filter and on which taps are inside: a table over the few classes of that.
//
//     y = D . K . alpha + bias + |s| P(I)          K = sum over the taps inside of k . A
//
// then, where present: y + offset, y + residual. Absent parts are null.

struct ConvJob {
  const Word* words;              // [images, height, width, words of a pixel]
  const int* counts;              // [images, height, width]: bits that are 1
  const float* magnitudes;        // A [images, height, width]; null: no K
  const Word* weights;            // [out_channels, rows * columns, words of a pixel]
  const int* corrections;         // [row classes * column_classes, out_channels]
  const int* row_class;           // [out_height]: which rows of the kernel are inside; null: all, everywhere
  const int* column_class;        // [out_width], null with row_class
  const float* scale_filter;      // k [rows, columns]
  const float* weight_scale;      // alpha [out_channels]
  const float* bias;              // [out_channels]
  const Activation* shortcut;     // I, at the output's pixels [images, out_height, out_width, shortcut_channels]
  const Activation* offset;       // [images of image_pixels, out_channels], such as the time projection
  const Activation* residual;     // [images, out_height, out_width, out_channels]
  Activation* out;                // y [images, out_height, out_width, out_channels]
  int* integers;                  // D instead of y, in the same shape; null: y
  float shortcut_scale;           // |s|
  int word_count;                 // of a pixel
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
  int paired;                     // whether out_channels and shortcut_channels are even
  int image_pixels;               // output pixels that share an offset
  int tile_images;                // conv_bmma: output pixels of a tile, images x rows x columns
  int tile_rows;
  int tile_columns;
};

// What the epilogue needs of an output pixel, whatever the channel.
struct __align__(16) PixelTerms {
  int pixel;     // index of the output pixel; -1: none, the tile reaches over the edge
  int ones;      // popcount(window)
  int border;    // row of `corrections`
  float scale;   // K
};

// KNOWN_ROWS and KNOWN_COLUMNS of the kernel; 0: as the job says. If known, all loads are under way at once.
template <int KNOWN_ROWS, int KNOWN_COLUMNS>
__device__ inline PixelTerms pixel_terms(const ConvJob& job, int image, int y, int x) {
  const int rows = KNOWN_ROWS ? KNOWN_ROWS : job.rows;
  const int columns = KNOWN_COLUMNS ? KNOWN_COLUMNS : job.columns;
  PixelTerms terms = {-1, 0, 0, 0.0f};
  if (image >= job.images || y >= job.out_height || x >= job.out_width) return terms;
  terms.pixel = (image * job.out_height + y) * job.out_width + x;
  if (job.row_class) terms.border = job.row_class[y] * job.column_classes + job.column_class[x];
#pragma unroll
  for (int row = 0; row < rows; row++) {
    int source_y = y * job.stride_y - job.top + row;
#pragma unroll
    for (int column = 0; column < columns; column++) {
      int source_x = x * job.stride_x - job.left + column;
      bool inside = source_y >= 0 && source_y < job.height && source_x >= 0 && source_x < job.width;
      int source = (image * job.height + source_y) * job.width + source_x;
      terms.ones += inside ? job.counts[source] : 0;
      if (job.magnitudes && inside) {
        float part = __fmul_rn(job.magnitudes[source], job.scale_filter[row * columns + column]);
        terms.scale = __fadd_rn(terms.scale, part);
      }
    }
  }
  return terms;
}

__device__ __forceinline__ int dot(const ConvJob& job, const PixelTerms& terms, int channel, int matches) {
  int correction = job.corrections[(size_t)terms.border * job.out_channels + channel];
  return 4 * matches - 2 * terms.ones + correction;
}

// What two neighbouring output channels read from large tensors, so that several pairs can read at once.
struct Gathered {
  float2 shortcut[2], residual;
};

__device__ __forceinline__ Gathered gather(const ConvJob& job, int pixel, int channel) {
  Gathered found = {};
  bool second = channel + 1 < job.out_channels;
  size_t place = (size_t)pixel * job.out_channels + channel;
  if (job.shortcut) {
    int from = channel % job.shortcut_channels;
    const Activation* source = job.shortcut + (size_t)pixel * job.shortcut_channels;
    // Odd widths: the second channel may be the first one again, or lie beyond the pixel's last.
    bool next = second && from + 1 < job.shortcut_channels;
    found.shortcut[0] = load_two(source + from, job.paired, next);
    if (second && !next) found.shortcut[0].y = to_float(source[0]);
    int more = from + job.out_channels;
    if (more < job.shortcut_channels)
      found.shortcut[1] = load_two(source + more, job.paired, second && more + 1 < job.shortcut_channels);
  }
  if (job.residual) found.residual = load_two(job.residual + place, job.paired, second);
  return found;
}

// P(I) of one channel: the mean of the input channels that equal it modulo the output's number of channels; with
// fewer input channels they repeat. `first` and `second` are the first two.
__device__ __forceinline__ float tiled(const ConvJob& job, int pixel, int channel, float first, float second) {
  if (job.shortcut_channels <= job.out_channels) return first;
  const Activation* source = job.shortcut + (size_t)pixel * job.shortcut_channels;
  float total = first;
  int count = 1;
  for (int c = channel + job.out_channels; c < job.shortcut_channels; c += job.out_channels, count++)
    total = __fadd_rn(total, count == 1 ? second : to_float(source[c]));
  return __fdiv_rn(total, (float)count);
}

// Every operation is rounded on its own, in the order of the formula above.
__device__ __forceinline__ float epilogue(
    const ConvJob& job, const PixelTerms& terms, int channel, int matches, float shortcut, float residual) {
  float y = __int2float_rn(dot(job, terms, channel, matches));
  int image = terms.pixel / job.image_pixels;
  if (job.magnitudes) y = __fmul_rn(y, terms.scale);
  if (job.weight_scale) y = __fmul_rn(y, job.weight_scale[channel]);
  if (job.bias) y = __fadd_rn(y, job.bias[channel]);
  if (job.shortcut) y = __fadd_rn(y, __fmul_rn(job.shortcut_scale, shortcut));
  if (job.offset) y = __fadd_rn(y, to_float(job.offset[image * job.out_channels + channel]));
  if (job.residual) y = __fadd_rn(y, residual);
  return y;
}

__device__ __forceinline__ void finish(
    const ConvJob& job, const PixelTerms& terms, int channel, int2 matches, const Gathered& found) {
  bool second = channel + 1 < job.out_channels;
  size_t place = (size_t)terms.pixel * job.out_channels + channel;
  if (job.integers) {
    job.integers[place] = dot(job, terms, channel, matches.x);
    if (second) job.integers[place + 1] = dot(job, terms, channel + 1, matches.y);
    return;
  }
  float2 shortcut = found.shortcut[0], y = {};
  if (job.shortcut) {
    shortcut.x = tiled(job, terms.pixel, channel, shortcut.x, found.shortcut[1].x);
    if (second) shortcut.y = tiled(job, terms.pixel, channel + 1, shortcut.y, found.shortcut[1].y);
  }
  y.x = epilogue(job, terms, channel, matches.x, shortcut.x, found.residual.x);
  if (second) y.y = epilogue(job, terms, channel + 1, matches.y, shortcut.y, found.residual.y);
  store_two(job.out + place, y, job.paired, second);
}

#define GATHER 4   // pixels whose reads a thread has under way at once

// Outputs of a tile from its counts in shared memory, [pixels][stride] of which the first `filters` (even, at most
// twice the workers) count. A worker keeps its pair of channels, and goes through the pixels with its fellows.
__device__ __forceinline__ void finish_tile(
    const ConvJob& job, const PixelTerms* terms, const int* counts, int stride, int pixels, int filters,
    int first_filter, int worker, int workers) {
  int pairs = filters / 2, column = worker % pairs * 2, channel = first_filter + column;
  int fellows = workers / pairs, first = worker / pairs;
  if (first >= fellows || channel >= job.out_channels) return;
#pragma unroll 1
  for (int start = first; start < pixels; start += GATHER * fellows) {
    Gathered found[GATHER];
#pragma unroll
    for (int i = 0; i < GATHER; i++) {
      int p = start + i * fellows;
      if (p < pixels && terms[p].pixel >= 0) found[i] = gather(job, terms[p].pixel, channel);
    }
#pragma unroll
    for (int i = 0; i < GATHER; i++) {
      int p = start + i * fellows;
      if (p >= pixels || terms[p].pixel < 0) continue;
      finish(job, terms[p], channel, *reinterpret_cast<const int2*>(counts + p * stride + column), found[i]);
    }
  }
}
