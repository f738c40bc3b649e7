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
// then, where present: y + projection, y + residual, (1 - beta) y + beta previous. Absent parts are null.

struct ConvJob {
  const Word* words;              // [images, height, width, words of a pixel]
  const int* counts;              // [images, height, width]: bits that are 1
  const float* magnitudes;        // A [images, height, width]; null: no K
  const Word* weights;            // [out_channels, rows * columns, words of a pixel]
  const int* corrections;         // [row classes * column_classes, out_channels]
  const int* row_class;           // [out_height]: which rows of the kernel are inside
  const int* column_class;        // [out_width]
  const float* scale_filter;      // k [rows, columns]
  const float* weight_scale;      // alpha [out_channels]
  const float* bias;              // [out_channels]
  const Activation* shortcut;     // I or P(I) [images, source_height, source_width, shortcut_channels]
  const Activation* projection;   // [images of image_pixels, out_channels], of the time embedding
  const Activation* residual;     // [images, out_height, out_width, out_channels]
  const float* blend;             // beta [images of image_pixels] of a cross-timestep connection
  const Activation* previous;     // [images, out_height, out_width, out_channels], one sampler step before
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
  int source_height;              // of the shortcut
  int source_width;
  int cell_height;                // pixels of the shortcut averaged into one, cut by the border
  int cell_width;
  int image_pixels;               // output pixels that share a projection and a beta
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

__device__ inline PixelTerms pixel_terms(const ConvJob& job, int image, int y, int x) {
  PixelTerms terms = {-1, 0, 0, 0.0f};
  if (image >= job.images || y >= job.out_height || x >= job.out_width) return terms;
  terms.pixel = (image * job.out_height + y) * job.out_width + x;
  terms.border = job.row_class[y] * job.column_classes + job.column_class[x];
  for (int row = 0; row < job.rows; row++) {
    int source_y = y * job.stride_y - job.top + row;
    if (source_y < 0 || source_y >= job.height) continue;
    for (int column = 0; column < job.columns; column++) {
      int source_x = x * job.stride_x - job.left + column;
      if (source_x < 0 || source_x >= job.width) continue;
      int source = (image * job.height + source_y) * job.width + source_x;
      terms.ones += job.counts[source];
      if (job.magnitudes) {
        float part = __fmul_rn(job.magnitudes[source], job.scale_filter[row * job.columns + column]);
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

// P(I) of one output: the mean of the cell's pixels, then of the input channels that equal `channel` modulo the
// number of output channels; with fewer input channels they repeat.
__device__ inline float shortcut_value(const ConvJob& job, int pixel, int channel) {
  int channels = job.shortcut_channels;
  if (channels == job.out_channels && job.cell_height * job.cell_width == 1)
    return to_float(job.shortcut[(size_t)pixel * channels + channel]);
  int x = pixel % job.out_width * job.cell_width, line = pixel / job.out_width;
  int y = line % job.out_height * job.cell_height, image = line / job.out_height;
  int height = min(job.cell_height, job.source_height - y), width = min(job.cell_width, job.source_width - x);
  const Activation* corner =
      job.shortcut + (((size_t)image * job.source_height + y) * job.source_width + x) * channels;
  float total = 0.0f;
  int equal = 0;
  for (int c = channel % channels; c < channels; c += job.out_channels, equal++) {
    float sum = 0.0f;
    for (int i = 0; i < height; i++)
      for (int j = 0; j < width; j++)
        sum = __fadd_rn(sum, to_float(corner[((size_t)i * job.source_width + j) * channels + c]));
    total = __fadd_rn(total, __fdiv_rn(sum, (float)(height * width)));
  }
  return __fdiv_rn(total, (float)equal);
}

// Every operation is rounded on its own, in the order of bidm's reference.
__device__ inline float epilogue(const ConvJob& job, const PixelTerms& terms, int channel, int matches) {
  float y = __int2float_rn(dot(job, terms, channel, matches));
  if (job.magnitudes) y = __fmul_rn(y, terms.scale);
  if (job.weight_scale) y = __fmul_rn(y, job.weight_scale[channel]);
  if (job.bias) y = __fadd_rn(y, job.bias[channel]);
  if (job.shortcut)
    y = __fadd_rn(y, __fmul_rn(job.shortcut_scale, shortcut_value(job, terms.pixel, channel)));
  int image = terms.pixel / job.image_pixels;
  if (job.projection) y = __fadd_rn(y, to_float(job.projection[image * job.out_channels + channel]));
  size_t place = (size_t)terms.pixel * job.out_channels + channel;
  if (job.residual) y = __fadd_rn(y, to_float(job.residual[place]));
  if (job.blend) {
    float beta = job.blend[image];
    float before = __fmul_rn(beta, to_float(job.previous[place]));
    y = __fadd_rn(__fmul_rn(__fadd_rn(1.0f, -beta), y), before);
  }
  return y;
}

// Store two neighbouring channels of an output pixel, as far as they exist.
__device__ inline void finish(const ConvJob& job, const PixelTerms& terms, int channel, int first, int second) {
  if (terms.pixel < 0 || channel >= job.out_channels) return;
  bool both = channel + 1 < job.out_channels;
  size_t place = (size_t)terms.pixel * job.out_channels + channel;
  if (job.integers) {
    job.integers[place] = dot(job, terms, channel, first);
    if (both) job.integers[place + 1] = dot(job, terms, channel + 1, second);
    return;
  }
  float y = epilogue(job, terms, channel, first);
  if (both && job.out_channels % 2 == 0) {
    store_two(job.out + place, y, epilogue(job, terms, channel + 1, second));
  } else {
    job.out[place] = from_float(y);
    if (both) job.out[place + 1] = from_float(epilogue(job, terms, channel + 1, second));
  }
}
