package android.graphics;

public final class Bitmap {
  private final int[] colours;
  private final int across;

  /** Packed ARGB_8888, row by row. */
  public Bitmap(int[] colours, int width) {
    this.colours = colours;
    this.across = width;
  }

  public void getPixels(int[] pixels, int offset, int stride, int x, int y, int width, int height) {
    for (int row = 0; row < height; row++) {
      System.arraycopy(colours, (y + row) * across + x, pixels, offset + row * stride, width);
    }
  }
}
